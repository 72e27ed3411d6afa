"""Each pair of models is built once for all parity tests; no test changes its weights."""

import pytest
from tiny_models import CONFIGS


@pytest.fixture(scope="session", params=list(CONFIGS))
def pair(request):
    from partner import make_pair  # seconds to import, and with `-n 2` this file is read before anything starts

    return make_pair(CONFIGS[request.param])
