"""A run with `on_bad_row: skip` keeps what it left out in its folder, and leaves out the same when it goes on."""

import json
from pathlib import Path

from tests.train.runs import PAIR_ROWS, largest_difference, trained
from tunesmith import SFTConfig, SFTTrainer
from tunesmith.data.read import read_rows


def test_a_resumed_run_leaves_out_the_same_rows(tmp_path: Path, tiny_model: Path) -> None:
    file, folder = tmp_path / "rows.jsonl", tmp_path / "run"
    lines = [json.dumps(row) for row in PAIR_ROWS]
    file.write_text("\n".join([*lines[:3], "broken", *lines[3:], '{"prompt": "a", "completion": 7}', ""]))

    def run(max_steps: int) -> SFTTrainer:
        args = SFTConfig(
            output_dir=str(folder),
            on_bad_row="skip",
            max_steps=max_steps,
            save_steps=2,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to=[],
            lr_scheduler_type="constant",
        )
        rows = read_rows(str(file))
        return SFTTrainer(model=str(tiny_model), args=args, train_dataset=rows, eval_dataset=rows)

    trained(run(2))
    kept = [json.loads(line) for line in (folder / "skipped_rows.jsonl").read_text().splitlines()]
    assert [(record["split"], record["line"]) for record in kept] == [
        ("eval", 4),
        ("eval", 10),
        ("train", 4),
        ("train", 10),
    ]
    resumed = run(4)
    weights = trained(resumed, resume_from_checkpoint=True)
    assert [json.loads(line) for line in (folder / "skipped_rows.jsonl").read_text().splitlines()] == kept
    folder = tmp_path / "whole"
    assert largest_difference(weights, trained(run(4))) == 0
