"""Each pair of models is built once for all parity tests; no test changes its weights."""

import pytest
from partner import Pair, make_pair
from tiny_models import CONFIGS


@pytest.fixture(scope="session", params=list(CONFIGS))
def pair(request) -> Pair:
    return make_pair(CONFIGS[request.param])
