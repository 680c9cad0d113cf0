# Containers. `make docker-up` is enough where an engine runs that can pull an image; elsewhere `make docker-ready` first.
#
# BASE_IMAGE   what images are built on; default: the base of `make docker-base` if it was made, else Python's slim image
# MODEL_DIR    the model that docker-up serves (docker-compose.yml lists the other variables)

DOCKER_BASE := penstock-base:bookworm
BASE_IMAGE ?= $(shell $(with_engine) docker image inspect $(DOCKER_BASE) >/dev/null 2>&1 && echo $(DOCKER_BASE) || echo python:3.11-slim-bookworm)
IMAGE_TAG ?= latest
IMAGES := nats kvstore router worker
WHEELS := deploy/.wheels
HOST_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PY))
# Linux wheels for the base image's Python, whatever runs here.
WHEEL_PYTHON ?= 3.11
WHEEL_GLIBC := 2_36 2_35 2_34 2_31 2_28 2_27 2_26 2_24 2_17
WHEEL_FOR = --only-binary=:all: --implementation cp --python-version $(WHEEL_PYTHON) \
	$(foreach glibc,$(WHEEL_GLIBC),--platform manylinux_$(glibc)_$(shell uname -m)) \
	--platform manylinux2014_$(shell uname -m) --platform manylinux2010_$(shell uname -m) --platform manylinux1_$(shell uname -m)
with_engine := eval "$$(sh deploy/docker/engine.sh env)" &&
compose := $$(docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)

.PHONY: docker-ready docker-engine docker-engine-stop docker-base docker-wheels docker-build docker-up docker-down docker-test

docker-ready:  ## all that docker-up and docker-test need, on a bare machine: engine, base image, wheels, images
	$(MAKE) docker-engine
	$(MAKE) docker-base
	$(MAKE) docker-wheels
	$(MAKE) docker-build

docker-engine:  ## start a Docker engine of our own where none runs (root); docker-engine-stop ends it
	sh deploy/docker/engine.sh start

docker-engine-stop:
	sh deploy/docker/engine.sh stop

docker-base:  ## make the base image from Debian's packages, without a registry of images
	$(with_engine) sh deploy/docker/base-image.sh $(DOCKER_BASE)

docker-wheels: $(WHEELS)/.complete  ## fetch the images' wheels with this machine's pip settings; the build then asks no index

$(WHEELS)/.complete: pyproject.toml requirements.lock deploy/docker/requirements.py
	rm -rf $(WHEELS) && mkdir -p $(WHEELS)
	"$(HOST_PYTHON)" deploy/docker/requirements.py $(IMAGES) >$(WHEELS)/wanted.txt
	"$(HOST_PYTHON)" -m pip download --disable-pip-version-check -qq -d $(WHEELS) -c requirements.lock $(WHEEL_FOR) -r $(WHEELS)/wanted.txt
	touch $@

docker-build:  ## build the images
	$(with_engine) for image in $(IMAGES); do docker build --quiet -f deploy/Dockerfile --target $$image \
		--build-arg BASE_IMAGE=$(BASE_IMAGE) --build-arg PIP_INDEX_URL --build-arg PIP_EXTRA_INDEX_URL --build-arg PIP_TRUSTED_HOST \
		-t penstock-$$image:$(IMAGE_TAG) . || exit 1; done

docker-up:  ## start the same cluster in containers; serves on 127.0.0.1:8080
	$(with_engine) BASE_IMAGE=$(BASE_IMAGE) $(compose) up -d $(ARGS)

docker-down:  ## stop it; the SSD tier's volume stays (ARGS=-v removes it)
	$(with_engine) $(compose) down $(ARGS)

docker-test:  ## test the containers (skipped, with the reason, where no engine answers)
	"$(BIN)/python" -m pytest tests/docker -m docker -rs $(ARGS)
