"""What is said of several processes."""

from tunesmith.train.progress import slowest


def test_the_process_that_the_others_wait_for_is_named() -> None:
    waits = [{"waited": 0.5}, {"waited": 0.1}, {"waited": 0.3}]
    assert slowest(waits) == "process 1 slowest, others wait 40%"
    assert slowest([{"waited": 0.004}, {"waited": 0.0}]) == slowest([{"waited": 0.4}]) == slowest(()) == ""
