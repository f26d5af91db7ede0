from gla_suite import GlaSuite


class TestReference(GlaSuite):
  backend = "reference"
  drift = 2048 * 2.0**-24  # a decay close to 1 is rounded by half an ulp, the same way at every token
