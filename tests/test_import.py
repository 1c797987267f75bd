"""`import tunesmith` costs nothing, and its public names come from the modules that define them."""

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

import tunesmith

CPU_LIMIT_S = 0.3


def import_in_a_child(*, then: str, **variables: str) -> list[object]:
    """The JSON list `then` in a fresh interpreter after `import tunesmith`."""
    program = f"import tunesmith, json, os, sys, time; print(json.dumps({then}))"
    known = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))} | variables
    command = [sys.executable, "-I", "-c", program]
    child = subprocess.run(command, capture_output=True, text=True, check=True, env=known)
    result = json.loads(child.stdout)
    assert isinstance(result, list)
    return result


def test_import_takes_under_a_third_of_a_second_of_processor_time() -> None:
    """The interpreter's own start is in the figure; the least of three, so that a busy machine does not fail it."""
    seconds = min(float(str(import_in_a_child(then="[time.process_time()]")[0])) for _ in range(3))
    assert seconds < CPU_LIMIT_S, f"import tunesmith took {seconds:.2f} s of processor time; what does it load?"


def test_import_loads_no_heavy_library() -> None:
    heavy = {"accelerate", "datasets", "numpy", "peft", "torch", "transformers"}
    loaded = import_in_a_child(then="sorted({name.split('.')[0] for name in sys.modules})")
    assert not heavy.intersection(loaded)


def test_dir_lists_the_public_names_before_any_is_used() -> None:
    assert set(tunesmith.__all__) <= set(import_in_a_child(then="dir(tunesmith)"))


def test_every_public_name_has_a_home_and_no_other_name_has() -> None:
    assert sorted([*tunesmith._DEFINED_IN, "__version__"]) == sorted(tunesmith.__all__)


@pytest.mark.parametrize("name", sorted(name for name, home in tunesmith._DEFINED_IN.items() if find_spec(home)))
def test_a_public_name_is_the_object_of_the_module_that_defines_it(name: str) -> None:
    assert getattr(tunesmith, name) is getattr(import_module(tunesmith._DEFINED_IN[name]), name)


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match=r"module 'tunesmith' has no attribute 'SFTTrainr'"):
        _ = tunesmith.SFTTrainr


def test_what_scripts_import_from_trl_says_what_to_write() -> None:
    with pytest.raises(ImportError, match="no DataCollatorForCompletionOnlyLM; write SFTConfig"):
        exec("from tunesmith import DataCollatorForCompletionOnlyLM")
    with pytest.raises(ImportError, match="import it from trl, beside SFTConfig and SFTTrainer from tunesmith"):
        exec("from tunesmith import ModelConfig, SFTTrainer, TrlParser")
