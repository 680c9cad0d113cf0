"""The demo model: how it is made (corpus, tokenizer, training, card) and, in `penstock-demo/`, what came out."""
