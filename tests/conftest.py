"""Settings shared by every test."""

import torch
from hypothesis import settings

# torch's first calls are slow, so a deadline would fail on them and on nothing else.
settings.register_profile("default", deadline=None)
# The gate must not fail on one draw and pass on the next.
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("default")

# The tensors of a test are tiny: threads cost more than they save.
torch.set_num_threads(1)
