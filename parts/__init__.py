"""What the stages are built from. Import this package before torch: it sets how torch uses a CPU.

OpenMP's threads spin while they wait for one another. Beside another busy process the one that is
waited for is not running at all, and a training step takes five times as long; so they spin for a
few microseconds and then sleep. oneDNN keeps a compiled kernel for every shape of batch that it
has met, 3 GB of them in pre-training; the last eight are enough. Both libraries read these
variables once, when torch loads them; what you have set yourself is kept.

On Apple's GPUs some releases of torch lack an operation or two, the loss of CTC among them; torch
then runs it on the CPU.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
