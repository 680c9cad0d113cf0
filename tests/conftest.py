"""For all tests: properties are about values; how long an example takes on a busy machine is nobody's failure."""

import hypothesis

hypothesis.settings.register_profile("penstock", deadline=None)
hypothesis.settings.load_profile("penstock")
