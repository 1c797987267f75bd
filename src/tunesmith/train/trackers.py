"""`report_to`: whether its trackers are there, found out before anything takes time."""

from collections.abc import Iterable
from importlib.util import find_spec

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from tunesmith.errors import TunesmithError, nearest

PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "mlflow": "mlflow-skinny", "flyte": "flytekit"}
"""What is installed for a tracker, where it has another name."""
MODULES = {"azure_ml": "azureml", "flyte": "flytekit"}


def check_trackers(report_to: str | Iterable[str] | None) -> None:
    """Raises TunesmithError for a tracker that `transformers` does not know, and for one that is not installed."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    known = sorted([*INTEGRATION_TO_CALLBACK, "all", "none"])
    listed = ", ".join(known)
    for name in names:
        if name not in known:
            raise TunesmithError(f"report_to: no tracker is called {name!r}{nearest(name, known)}; there are {listed}")
        if name in ("all", "none") or _installed(MODULES.get(name, name)):
            continue
        package = PACKAGES.get(name, name)
        raise TunesmithError(f"report_to: {name} is not installed; run: pip install {package}")


def _installed(module: str) -> bool:
    # `transformers` takes either of the two.
    return find_spec(module) is not None or (module == "tensorboard" and find_spec("tensorboardX") is not None)
