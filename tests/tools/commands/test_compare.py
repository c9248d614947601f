"""`act24 compare` shows what event files hold and in what recipes differ."""

from act24.recipes.load import dump_recipe
from act24.tools.watch.tensorboard import RunLog


def a_run(folder, recipe, losses, rates, zeros=None):
    folder.mkdir()
    (folder / "recipe.toml").write_text(dump_recipe(recipe))
    log = RunLog(folder)
    for step, (loss, rate) in enumerate(zip(losses, rates, strict=True), 1):
        log.scalars({"loss/train": loss, "perf/tokens_per_s": rate}, step)
    if zeros is not None:
        log.layers("sparsity_relu/*", {0: zeros, 1: zeros + 0.1}, 1)
    log.close()


def test_figures_are_those_in_the_files_and_keys_those_that_differ(tiny, tmp_path, act24):
    wide = 'passes=[{use="relu2_ffn"}, {use="cola", attn_rank=4, mlp_rank=8}]'
    narrow = wide.replace("mlp_rank=8", "mlp_rank=16")
    a_run(tmp_path / "a", tiny(wide), [5.0, 4.25], [10.0, 3000.0], zeros=0.5)
    a_run(tmp_path / "b", tiny(narrow, "optimizer.lr=0.5"), [5.0, 4.5, 4.125], [1, 2000.0, 2500.0])
    status, out, _ = act24("compare", tmp_path / "a", tmp_path / "b", "--markdown")
    assert status == 0
    head, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    keys = ["passes.cola.mlp_rank", "optimizer.lr"]
    assert head == ["run", "step", "loss", "zeros after relu²", "tokens/s", *keys]
    assert set(rule) == {"---"}
    assert rows == [
        [str(tmp_path / "a"), "2", "4.2500", "55.0%", "1,505", "8", "0.01"],
        [str(tmp_path / "b"), "3", "4.1250", "–", "2,000", "16", "0.5"],
    ]
    status, out, _ = act24("compare", tmp_path / "a", tmp_path / "b")
    assert status == 0
    assert all(cell in out for row in rows for cell in row[1:])


def test_a_folder_that_is_no_run_is_named(tmp_path, act24):
    status, _, (line,) = act24("compare", tmp_path)
    assert status == 2
    assert line.endswith(f"{tmp_path} is no run: there is no recipe.toml in it")
