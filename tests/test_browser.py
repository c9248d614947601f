"""What `make browser-check` needs before it opens a browser."""

from tests.browser import recipes


def test_the_runs_to_look_at_load():
    demo, variant = recipes().values()
    assert (variant.train.steps, variant.optimizer.lr) == (20, 5e-4)
    assert demo.train.steps > 10 * variant.train.steps
