"""Settings shared by every test."""

import torch
from hypothesis import settings

# torch's first calls are slow, so a deadline would fail on them and on nothing else. The
# same draws each time: a test that passed for one must not fail for another by chance.
settings.register_profile("same", deadline=None, derandomize=True)
# Other draws each time, to look for what the former miss.
settings.register_profile("anew", deadline=None, derandomize=False)
settings.load_profile("same")

# The tensors of a test are tiny: threads cost more than they save.
torch.set_num_threads(1)
