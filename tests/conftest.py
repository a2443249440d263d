"""No hub, no foreign progress bars, one thread a process: set before anything imports torch.

Every operation on tiny tensors would wait for all threads of OpenMP, four times as long on a busy
machine; the tests share the cores by running in several processes.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
