"""Flags and recipes: what is accepted, and that what is not is named with its nearest neighbour."""

import re
from pathlib import Path

import pytest
from visattn_tools.cli import UserError
from visattn_tools.config import config_text, parse_train_args
from visattn_tools.flags import train_parser
from visattn_tools.timm_flags import ELSEWHERE

DIGITS = ["--dataset", "digits", "--model", "test_efficientnet"]
ROOT = Path(__file__).parents[2]


def _config(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    recipe = "model: test_efficientnet\ndataset: digits\nlr: 2e-3\nscale: [0.5, 1.0]\namp: true\nsmoothing: 0.0\n"
    args = parse_train_args([*_config(tmp_path, recipe), "--lr", "0.5", "--no-amp"])
    assert (args.lr, args.scale, args.amp, args.smoothing, args.epochs) == (0.5, [0.5, 1.0], False, 0.0, 300)


def test_recipe_keys_may_be_spelled_as_flags(tmp_path: Path) -> None:
    args = parse_train_args(_config(tmp_path, "model: test_efficientnet\ndataset: digits\nbatch-size: 7\n"))
    assert args.batch_size == 7


def test_saved_config_reads_back_as_itself(tmp_path: Path) -> None:
    more = ["--aa", "rand-m9", "--mixup", "0.8", "--mean", "0.5", "0.4", "0.3", "--channels-last"]
    args = parse_train_args([*DIGITS, *more, "--model-kwargs", "drop_path_rate=0.1", "act_layer=relu"])
    again = parse_train_args(_config(tmp_path, config_text(args)))
    assert {**vars(again), "config": None} == vars(args)


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "all.yaml").write_text("epochs: 7\nlr: 0.5\naa: rand-m9\nmodel_kwargs: {a: 1, b: 2}\n")
    (tmp_path / "base" / "family.yaml").write_text("base: all.yaml\nepochs: 8\nweight-decay: 0.1\n")
    flags = _config(tmp_path, "base: base/family.yaml\nmodel_kwargs: {b: 3}\naa: null\n")
    args = parse_train_args([*DIGITS, *flags, "--lr", "0.25"])
    assert (args.epochs, args.weight_decay, args.lr, args.aa) == (8, 0.1, 0.25, None)
    assert args.model_kwargs == {"a": 1, "b": 3}
    (tmp_path / "base" / "all.yaml").write_text("epoch: 7")
    with pytest.raises(UserError, match=r"base/all.yaml: unknown key 'epoch'; did you mean 'epochs'"):
        parse_train_args([*DIGITS, *flags])
    (tmp_path / "base" / "all.yaml").write_text("base: family.yaml")
    with pytest.raises(UserError, match=r"recipe.yaml: .*base/family.yaml extends itself"):
        parse_train_args([*DIGITS, *flags])
    with pytest.raises(UserError, match=r"recipe.yaml: base: 3 must be the name of a file"):
        parse_train_args([*DIGITS, *_config(tmp_path, "base: 3")])
    with pytest.raises(UserError, match=r"--config .*nowhere.yaml: No such file"):
        parse_train_args([*DIGITS, *_config(tmp_path, "base: nowhere.yaml")])


def test_every_recipe_at_the_top_of_configs_parses() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        assert parse_train_args(["--config", str(path)]).model


def test_every_flag_has_help() -> None:
    parser = train_parser()
    assert [action.dest for action in parser._actions if not action.help] == []
    assert "--grad-accum-steps" in parser.format_help()


# What timm's train.py took when it had got distillation, and what notes and tests of 1.0.31 name besides.
TIMM_FLAGS = """
    aa amp amp-dtype aug-repeats aug-splits batch-size bce-loss bce-pos-weight bce-sum bce-target-thresh bn-eps
    bn-momentum channels-last checkpoint-hist class-map class-stats clip-grad clip-mode color-jitter
    color-jitter-prob config cooldown-epochs crop-pct cutmix cutmix-minmax data-dir dataset dataset-download
    dataset-trust-remote-code decay-epochs decay-milestones decay-rate device device-modules dist-bn
    distill-loss-weight dr drop drop-block drop-connect drop-path epoch-repeats epochs eval-metric experiment
    fast-norm fuser gaussian-blur-prob gp grad-accum-steps grad-checkpointing grayscale-prob head-init-bias
    head-init-scale hflip img-size in-chans initial-checkpoint input-img-mode input-key input-size interpolation
    jsd-loss kd-distill-type kd-loss-type kd-model-name kd-student-feature-dim kd-teacher-feature-dim kd-temperature
    kd-token-distill-type layer-decay layer-decay-min-scale layer-decay-no-opt-scale local-rank log-interval
    log-wandb loss loss-class-weight loss-pos-weight loss-weight-power lr lr-base lr-base-scale lr-base-size
    lr-cycle-decay lr-cycle-limit lr-cycle-mul lr-decay-fn lr-k-decay lr-noise lr-noise-pct lr-noise-std
    lr-stable-timescale mean min-lr mixup mixup-mode mixup-off-epoch mixup-prob mixup-switch-prob model model-dtype
    model-ema model-ema-decay model-ema-force-cpu model-ema-warmup model-kwargs momentum multilabel-threshold
    naflex-loader naflex-loss-scale naflex-max-seq-len naflex-patch-size-probs naflex-patch-sizes
    naflex-train-seq-lens no-aug no-ddp-bb no-prefetcher no-resume-opt num-classes opt opt-betas opt-eps opt-kwargs
    output patience-epochs pin-mem poly-epsilon poly-gamma pretrained pretrained-cfg-overlay pretrained-path ratio
    recount recovery-interval remode reprob resplit resume save-epochs save-images scale sched sched-on-updates seed
    smoothing split-bn start-epoch std stop-epoch sync-bn synchronize-step target-format target-key task
    task-loss-weight torchcompile torchcompile-mode torchscript train-crop-mode train-interpolation
    train-num-samples train-split tta use-multi-epochs-loader val-interval val-num-samples val-split
    validation-batch-size vflip wandb-project wandb-resume-id wandb-tags warmup-epochs warmup-lr warmup-prefix
    weight-decay worker-seeding workers
"""


def test_every_flag_of_timm_is_there_or_has_advice(tmp_path: Path) -> None:
    own = set(train_parser()._option_string_actions)
    missing = {name for name in TIMM_FLAGS.split() if f"--{name}" not in own}
    assert missing | {"amp-impl", "apex-amp", "native-amp"} == set(ELSEWHERE)
    named = {flag for advice in ELSEWHERE.values() for flag in re.findall(r"--[a-z-]+[a-z]", advice)}
    assert named <= own
    for flag in ("--local_rank", "--local-rank=3"):
        with pytest.raises(UserError, match=rf"unknown argument {flag[:12]}: torchrun says it to each process"):
            parse_train_args([*DIGITS, flag])
    with pytest.raises(UserError, match=r"recipe.yaml: unknown key 'recovery_interval': use --checkpoint-minutes"):
        parse_train_args([*DIGITS, *_config(tmp_path, "recovery_interval: 10")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bath-size", "8"], r"unknown argument --bath-size; did you mean '--batch-size'"),
        (["--batch-size", "0"], r"--batch-size: 0 is out of range; expected an integer >= 1"),
        (["--batch-size", "many"], r"--batch-size: 'many' is not a number; expected an integer >= 1"),
        (["--img-size", "8"], r"--img-size: 8 is out of range; expected an integer >= 16 and <= 4096"),
        (["--lr", "0"], r"--lr: 0 is out of range; expected a number > 0 and <= 100"),
        (["--lr", "nan"], r"--lr: nan is out of range"),
        (["--epochs", "-1"], r"--epochs: -1 is out of range"),
        (["--sched", "cosin"], r"--sched: invalid choice: 'cosin'"),
        (["--opt", "adamv"], r"--opt adamv: timm has no such optimizer; did you mean '.*adam'"),
        (["--model", "biformer_tt"], r"--model biformer_tt: no such model; did you mean 'biformer_t'"),
        (
            ["--dataset", "digit"],
            r"--dataset digit: unknown; use one of folder, digits, synthetic, torch/NAME, .*; did you mean 'digits'",
        ),
        (["--dataset", "folder"], r"--data-dir is missing"),
        (["--batch-size", "7", "--mixup", "0.2"], r"--batch-size 7 must be even with --mixup"),
        (["--initial-checkpoint", "no.safetensors"], r"--initial-checkpoint no.safetensors: no such file"),
        (["--scale", "1", "0.5"], r"--scale \[1.0, 0.5\]"),
        (["--amp", "--amp-dtype", "float16", "--device", "cpu"], r"--amp-dtype float16 needs --device cuda"),
        (["--device", "gpu"], r"--device gpu cannot be used"),
        (["--resume", "auto"], r"--resume auto needs --experiment"),
        (["--config", "no.yaml"], r"--config no.yaml: No such file"),
    ],
)
def test_bad_flags(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_train_args([*DIGITS, *flags])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"recipe.yaml: unknown key 'epoch'; did you mean 'epochs'"),
        ("epochs: many", r"recipe.yaml: argument --epochs: 'many' is not a number"),
        ("epochs: [1]", r"recipe.yaml: epochs: \[1\] must be one value"),
        ("scale: 0.5", r"recipe.yaml: scale: 0.5 must be a list"),
        ("scale: [0.5]", r"recipe.yaml: argument --scale: expected 2 arguments"),
        ("amp: 1", r"recipe.yaml: amp: 1 must be true or false"),
        ("model_kwargs: 3", r"recipe.yaml: model_kwargs: 3 must be keys with values"),
        ("config: other.yaml", r"recipe.yaml: unknown key 'config'"),
        ("- epochs", r"recipe.yaml holds a list; expected keys with values"),
        ("a: [", r"recipe.yaml is no YAML"),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_train_args([*DIGITS, *_config(tmp_path, text)])


def test_model_is_required() -> None:
    with pytest.raises(UserError, match="--model is missing"):
        parse_train_args(["--dataset", "digits"])
