"""Whatever the OpenAPI description allows, and more: no fault, and no reply that it does not name.

The longer run, against a server that runs anywhere, is in benchmarks/serve.py.
"""

import hypothesis
import schemathesis
import scripted
from schemathesis.specs.openapi.checks import positive_data_acceptance

from gtalign_jax.serving.api import ApiConfig

KEY = "key-of-the-fuzz"
# What no schema can say: that the last message is the user's, or how many tokens a text makes.
BEYOND = [positive_data_acceptance]


APP, _ = scripted.make(config=ApiConfig(key=KEY))
described = schemathesis.openapi.from_asgi("/openapi.json", APP)


@described.parametrize()
@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
def test_no_request_is_answered_otherwise_than_described(case):
    case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, excluded_checks=BEYOND)
