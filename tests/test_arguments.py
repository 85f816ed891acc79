# SPDX-License-Identifier: Apache-2.0
"""The command line: what it refuses, recipe files, and its help."""

import argparse
import importlib
import re
import warnings
from pathlib import Path

import pytest

import train_lift
import train_place
from utils.command_line import ArgumentParser, call
from utils.publishing.card import _quoted
from utils.recipe_files import read_lines, split_line
from utils.training.arguments import parse_args

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train_lift": train_lift, "train_place": train_place}
RECIPES = sorted(path for folder in ("recipes", "assets") for path in (ROOT / folder).glob("*.args"))
TEACHER, DATA, STUDENT = ["--pretrained_model_name_or_path", "t"], ["--dataset_name", "d"], ["--pruning_ratio", "0.5"]


@pytest.fixture
def parse(tmp_path):
    """`parse("--flag", value, script="train_place", given=[...])`, with an output folder of its own."""

    def parse_flags(*flags, script="train_place", given=(*TEACHER, *DATA, *STUDENT)):
        argv = [*given, "--output_dir", str(tmp_path / "output"), *map(str, flags)]
        return parse_args(SCRIPTS[script].__doc__, SCRIPTS[script].add_method_arguments, argv)

    return parse_flags


def actions(script: str) -> list[argparse.Action]:
    """Every argument of a script."""
    found = []
    real = ArgumentParser.parse_args

    def keep(self, *args, **kwargs):
        found.extend(self._actions)
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(ArgumentParser, "parse_args", keep)
        patch.setattr("builtins.print", lambda *args, **kwargs: None)
        parse_args("", SCRIPTS[script].add_method_arguments, ["--help"])
    return found


def test_defaults_parse(parse):
    args = parse()
    assert args.pretrained_model_name_or_path == "t" and args.pruning_ratio == 0.5
    assert args.lambda_task == args.lambda_kd_output == 1 and args.lambda_kd_feat == 0
    assert args.group_size == 16 and args.learning_rate == 2e-4 and args.mixed_precision is None


# What is refused

POSITIVE = (
    "resolution max_train_samples max_train_steps train_batch_size gradient_accumulation_steps learning_rate "
    "snr_gamma adam_epsilon logging_steps checkpointing_steps checkpoints_total_limit validation_steps "
    "validation_num_inference_steps validation_num_samples validation_batch_size "
    "max_train_minutes lora_rank cache_variants num_train_epochs ema_inv_gamma ema_power taylor_timesteps"
).split()
NOT_NEGATIVE = (
    "lambda_task lambda_kd_output lambda_kd_feat dataloader_num_workers lr_warmup_steps adam_weight_decay seed "
    "max_grad_norm coarse_scale timestep_balance task_balance noise_offset input_perturbation "
    "validation_shown_samples validation_guidance_scale feature_mask_sigma"
).split()
FRACTIONS = ["adam_beta1", "adam_beta2", "ema_decay", "dropout", "min_lr_rate"]


@pytest.mark.parametrize(
    "name, value",
    [(name, value) for name in POSITIVE for value in ("0", "-1")]
    + [(name, "-1") for name in NOT_NEGATIVE]
    + [(name, value) for name in FRACTIONS for value in ("-0.1", "1", "1.5", "nan")]
    + [("pruning_ratio", value) for value in ("0", "1", "-0.5", "2", "nan")]
    + [
        (name, value)
        for name in ("learning_rate", "max_grad_norm", "lambda_task", "coarse_scale", "timestep_balance")
        for value in ("nan", "inf")
    ],
)
def test_values_out_of_range(parse, name, value):
    with pytest.raises(ValueError, match=rf"^--{name} is {re.escape(str(float(value)).removesuffix('.0'))}"):
        parse(f"--{name}", value)


@pytest.mark.parametrize("name, value", [(name, "0") for name in NOT_NEGATIVE] + [(name, "0.0") for name in FRACTIONS])
@pytest.mark.filterwarnings("ignore:.*no effect here")
def test_values_on_the_edge_are_taken(parse, name, value):
    assert getattr(parse(f"--{name}", value), name) == 0


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.filterwarnings("ignore:.*no effect here")
def test_small_values_are_taken(parse, name):
    assert getattr(parse(f"--{name}", "1"), name) == 1


@pytest.mark.parametrize("size", ["1", "0", "-3"])
def test_a_line_needs_two_elements(parse, size):
    with pytest.raises(ValueError, match=f"--group_size is {size}; "):
        parse("--group_size", size)
    assert parse("--group_size", "2").group_size == 2


CONFIG, EXISTING = ["--student_config", "c"], ["--student_model_name_or_path", "s"]
SCRATCH = ["--lambda_kd_output", "0"]
CONTRADICTIONS = [
    ([*TEACHER, *DATA], "Give one of --pruning_ratio, --student_preset, .*--student_config.*found none"),
    ([*TEACHER, *DATA, *STUDENT, *CONFIG], "found --pruning_ratio and --student_config"),
    ([*TEACHER, *DATA, *STUDENT, *EXISTING], "found --pruning_ratio and --student_model_name_or_path"),
    ([*TEACHER, *DATA, *CONFIG, *EXISTING], "found --student_config and --student_model_name_or_path"),
    ([*DATA, *STUDENT, *SCRATCH], "--pruning_ratio cuts a teacher.*--pretrained_model_name_or_path"),
    ([*DATA, *CONFIG], "nothing to distil from.*--lambda_kd_output 0"),
    ([*DATA, *CONFIG, *SCRATCH, "--lambda_kd_feat", "1"], "nothing to distil from.*--lambda_kd_feat 0"),
    ([*TEACHER, *DATA, *STUDENT, *SCRATCH, "--lambda_task", "0"], "--lambda_task.*all 0: nothing to train on"),
    ([*TEACHER, *STUDENT], "--dataset_name and --train_data_dir; found neither"),
    ([*TEACHER, *STUDENT, *DATA, "--train_data_dir", "f"], "--dataset_name and --train_data_dir; found both"),
    ([*TEACHER, *STUDENT, *DATA, "--resume_from_checkpoint", "latest", "--overwrite_output_dir"], "deletes it"),
    ([*TEACHER, *STUDENT, *DATA, "--background", "whyte"], "--background: .*'whyte'.* Give a colour's name"),
    ([*TEACHER, *STUDENT, *DATA, "--background", "#ffffff80"], "--background #ffffff80 is transparent itself"),
    (
        [*TEACHER, *STUDENT, "--train_data_dir", "f", "--validation_split", "test"],
        "--validation_split test is a part of --train_data_dir.*give --train_split",
    ),
    *(
        ([*TEACHER, *STUDENT, *DATA, "--crop", *box.split()], f"--crop {box}: give four numbers, top and left")
        for box in ("57 25 128", "57 25 128 128 3", "-1 0 8 8", "0 -2 8 8", "0 0 0 8", "0 0 8 -8")
    ),
    (
        [*TEACHER, *STUDENT, *DATA, *"--crop 5 2 8 8 --center_crop".split()],
        "--crop 5 2 8 8 is a square .*--no-center_c",
    ),
]


@pytest.mark.parametrize("given, message", CONTRADICTIONS)
def test_contradictions(parse, given, message):
    with pytest.raises(ValueError, match=message):
        parse(given=given)


@pytest.mark.parametrize("student", [CONFIG, EXISTING])
@pytest.mark.parametrize("data", [DATA, ["--train_data_dir", "f"]])
def test_training_from_scratch_is_taken(parse, student, data):
    assert parse(given=[*student, *data, *SCRATCH]).pretrained_model_name_or_path is None


def test_an_output_folder_in_use(parse, tmp_path):
    folder = tmp_path / "output"
    folder.mkdir()
    parse()  # an empty folder will do
    (folder / "log.jsonl").touch()
    with pytest.raises(ValueError, match="--output_dir .*not empty.*--resume_from_checkpoint.*--overwrite_output_dir"):
        parse()
    with pytest.raises(ValueError, match="has no checkpoint"):  # nor is it the folder of a run
        parse("--resume_from_checkpoint", "latest")
    with pytest.warns(UserWarning, match="--output_dir .*not empty.* The run itself would be refused"):
        parse("--dry_run")
    assert parse("--overwrite_output_dir").overwrite_output_dir
    assert (folder / "log.jsonl").exists()  # parsing deletes nothing


def test_an_output_folder_that_is_a_file(parse, tmp_path):
    (tmp_path / "output").touch()
    for flags in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]):
        with pytest.raises(ValueError, match="--output_dir .*is a file"):
            parse(*flags)


# Words that argparse refuses


@pytest.mark.parametrize(
    "given, meant",
    [
        ("--learning_rat 1", "--learning_rate"),
        ("--learning_rate_ 1", "--learning_rate"),
        ("--train-batch-size 4", "--train_batch_size"),
        ("--train_batchsize=4", "--train_batch_size"),
        ("--group-size 4", "--group_size"),
        ("--lr 1", "--learning_rate"),
        ("--lr=1", "--learning_rate"),
        ("--epochs 3", "--num_train_epochs"),
        ("--batch_size 4", "--train_batch_size"),
    ],
)
def test_a_misspelt_flag_suggests_the_right_one(parse, given, meant):
    with pytest.raises(ValueError, match=rf"{re.escape(given)}.*\(did you mean {meant}\?\).*--help"):
        parse(*given.split())


@pytest.mark.parametrize("given", ["--learning 1", "--use_em", "--max_train_step 4", "--lambda_kd 1"])
def test_no_abbreviations(parse, given):
    with pytest.raises(ValueError, match="unrecognized arguments"):
        parse(*given.split())


@pytest.mark.parametrize(
    "given, message",
    [
        ("--train_batch_size many", "--train_batch_size.*'many'"),
        ("--train_batch_size 1.5", "--train_batch_size.*'1.5'"),
        ("--weighting none", "--weighting.*'adaptive'"),
        ("--seed", "--seed.*expected one argument"),
        ("word", "unrecognized arguments: word"),
        ("@missing.args", "missing.args"),
    ],
)
def test_wrong_values_and_words(parse, given, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(*given.split())
    assert "did you mean" not in str(error.value)  # the flag is spelt right


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_least_rate_goes_with_a_cosine(parse, script):
    for scheduler in ("constant", "linear", "polynomial", "cosine_with_restarts", "constant_with_warmup"):
        with pytest.raises(ValueError, match=f"--min_lr_rate 0.5: --lr_scheduler {scheduler} does not fall to it"):
            parse("--min_lr_rate", "0.5", "--lr_scheduler", scheduler, script=script)
    assert parse("--min_lr_rate", "0.5", "--lr_scheduler", "cosine", script=script).min_lr_rate == 0.5


def test_flags_of_the_other_script(parse):
    with pytest.raises(ValueError, match="--group_size"):
        parse("--group_size", "4", script="train_lift")
    with pytest.raises(ValueError, match="--output_loss"):
        parse("--output_loss", "mse")
    assert parse("--output_loss", "mse", script="train_lift").output_loss == "mse"


def test_a_logarithm_is_not_balanced(parse):
    with pytest.raises(ValueError, match="--timestep_balance 0.5: --output_loss log"):
        parse("--output_loss", "log", "--timestep_balance", "0.5", script="train_lift")
    parse("--output_loss", "log", "--task_balance", "0.5", script="train_lift")


# Recipe files


def test_recipe_lines(parse, tmp_path):
    recipe = tmp_path / "my.args"
    recipe.write_text(
        "# a comment, 'with one quote and --seed 1\n"
        "\n"
        "--dataset_name 'a folder # with spaces'   # a comment behind\n"
        '   --image_column "the image"\n'
        "--use_ema\n"
        "--learning_rate=3e-3\n"
        "--seed 5 --max_train_steps 7\n"
        "--tracker_project_name 'name#1'#2 #3\n"
    )
    args = parse(f"@{recipe}", given=[*TEACHER, *STUDENT])
    assert args.dataset_name == "a folder # with spaces" and args.image_column == "the image"
    assert args.use_ema and args.learning_rate == 3e-3 and args.seed == 5 and args.max_train_steps == 7
    assert args.tracker_project_name == "name#1#2"


def test_what_comes_later_wins(parse, tmp_path):
    recipe = tmp_path / "my.args"
    recipe.write_text("--seed 5\n--max_train_steps 7\n")
    args = parse("--max_train_steps", "3", f"@{recipe}", "--seed", "6")
    assert args.seed == 6 and args.max_train_steps == 7


def test_a_home_that_no_shell_has_expanded(parse, monkeypatch):
    """Quoted, or behind an equals sign; what a recipe quotes is meant so."""
    monkeypatch.setenv("HOME", "/home/me")
    args = parse("--output_dir=~/a b", "--image_column", "~me", "--latent_cache_dir", "~/x")
    assert (args.output_dir, args.image_column, args.latent_cache_dir) == ("/home/me/a b", "~me", "/home/me/x")


WORDS = [
    (r"a#b #c", ["a#b"]),
    (r"a '#b' \#c", ["a", "#b", "#c"]),
    (r"'' a''b ''#c", ["", "ab", "#c"]),
    (
        r"~ ~/x --output_dir=~/x x~ '~/x' x/~",
        ["/home/me", "/home/me/x", "--output_dir=/home/me/x", "x~", "~/x", "x/~"],
    ),
    (r'"~/my data" ~nobody_is_called_this/x', ["/home/me/my data", "~nobody_is_called_this/x"]),
    (r"$HOME/x ${HOME}x x$HOME '$HOME' \$HOME", ["/home/me/x", "/home/mex", "x/home/me", "$HOME", "$HOME"]),
    (r'"$HOME x" "a \"b\" \$HOME" $5 $ a$', ["/home/me x", 'a "b" $HOME', "$5", "$", "a$"]),
    (r"C:\data\new \\server\share D:\ x", ["C:\\data\\new", r"\\server\share", "D:\\", "x"]),
    (r'"C:\my data\" --o="C:\a b" C:\$HOME', ["C:\\my data\\", "--o=C:\\a b", "C:\\/home/me"]),
    (r"a\ b a\'b 'a\b' a\nb", ["a b", "a'b", r"a\b", r"a\nb"]),
    ("--seed 5 \\", ["--seed", "5"]),  # copied from a shell
    ("\t--seed\u00a05  # c", ["--seed", "5"]),
    ("@other.args @@me '@me' \"@me\"", ["@other.args", "@@me", "@@me", "@@me"]),
]


@pytest.mark.parametrize("line, words", WORDS, ids=[line for line, _ in WORDS])
def test_words_of_a_recipe(monkeypatch, line, words):
    monkeypatch.setenv("HOME", "/home/me")
    assert split_line(line) == words


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf--seed 5\n--prompt caf\xc3\xa9\n",
        b"--seed 5\r\n\r\n--prompt caf\xc3\xa9",
        "\ufeff--seed 5\n--prompt caf\u00e9\n".encode("utf-16-le"),
        "--seed 5\n--prompt caf\u00e9\n".encode("utf-16"),
        b"--seed 5\r--prompt 'caf\xc3\xa9'  \x0c",
    ],
)
def test_files_as_editors_write_them(tmp_path, content):
    (tmp_path / "my.args").write_bytes(content)
    words = [word for line in read_lines(tmp_path / "my.args") for word in split_line(line)]
    assert words == ["--seed", "5", "--prompt", "caf\u00e9"]


def test_a_value_may_begin_with_at(parse, tmp_path):
    (tmp_path / "my.args").write_text("--tracker_project_name @@me\n--validation_prompts '@home' @@ a@b\n")
    args = parse(f"@{tmp_path / 'my.args'}")
    assert args.tracker_project_name == "@me" and args.validation_prompts == ["@home", "@", "a@b"]
    assert parse("--tracker_project_name", "@@me").tracker_project_name == "@me"
    assert parse("--tracker_project_name=@me").tracker_project_name == "@me"
    for word in ("@me", "@@me", "@a b", "~me", "$me", "a\\b", "C:\\a", "it's #1"):
        assert split_line(_quoted(word))[0] in (word, f"@{word}")
        (tmp_path / "card.args").write_text(f"--tracker_project_name {_quoted(word)}\n")
        assert parse(f"@{tmp_path / 'card.args'}").tracker_project_name == word


@pytest.mark.parametrize(
    "line, message",
    [
        ("--learning_rat 1", r"unrecognized arguments: --learning_rat 1 .did you mean --learning_rate"),
        ("seed 1", "unrecognized arguments: seed 1"),
        ("--seed 'x", "no closing quotation: ' is opened"),
        ("--seed x", "argument --seed: invalid int value: 'x'"),
        ("--seed=x", "argument --seed: invalid int value: 'x'"),
        ("--seed", "argument --seed: expected one argument"),
        ("--grouping none", "argument --grouping: invalid choice: 'none'"),
        ("--train_data_dir $NOT_SET_HERE/x", "[$]NOT_SET_HERE is not set; .*single quotes"),
        ("--train_data_dir ${{NOT_SET_HERE:-x}}", "[$]{ begins more than a variable's name"),
        ("--train_data_dir x/$(pwd)", "[$][(] begins more than a variable's name"),
        ("--pruning_ratio 2", "--pruning_ratio is 2.0; it must lie between"),
        ("--seed -1", "--seed is -1; it must not be negative"),
        ("--validation_images 3", "--validation_images is now --validation_shown_samples"),
        ("@nowhere.args", "@nowhere.args: there is no such recipe to read .No such file.* with two, @@"),
        ("@recipes/sd21_bk_tiny", "@recipes/sd21_bk_tiny: .*Did you mean @recipes/sd21_bk_tiny.args"),
        ("@sd21_bk_tiny.args", "@sd21_bk_tiny.args: .*Did you mean @recipes/sd21_bk_tiny.args"),
        ("@{recipe}", "is a recipe that reads itself"),
    ],
)
def test_an_error_names_file_and_line(parse, tmp_path, line, message):
    recipe, outer = tmp_path / "my.args", tmp_path / "outer.args"
    recipe.write_text(f"--use_ema\n\n{line.format(recipe=recipe)}\n")
    outer.write_text(f"@{recipe}\n")
    for name in (recipe, outer):
        with pytest.raises(ValueError, match=rf"^@{recipe}, line 3: (@\S+ )?{message}"):
            parse("--max_train_steps", "3", f"@{name}")


def test_an_error_of_the_command_line_names_no_file(parse, tmp_path):
    (tmp_path / "my.args").write_text("--seed 1\n--pruning_ratio 0.4\n")
    for flags, message in ((["--seed", "x"], "argument --seed"), (["--pruning_ratio", "2"], "--pruning_ratio is 2")):
        with pytest.raises(ValueError, match=f"^{message}"):
            parse(f"@{tmp_path / 'my.args'}", *flags)
    (tmp_path / "bytes.args").write_bytes(b"--seed 1\n\n--caption_column \xe9\n")
    with pytest.raises(ValueError, match="^@.*bytes.args cannot be read as a recipe: line 3: not in UTF-8"):
        parse(f"@{tmp_path / 'bytes.args'}")
    with pytest.raises(ValueError, match="there is no such recipe to read .Is a directory"):
        parse(f"@{tmp_path}")


def test_a_recipe_in_the_home_folder(parse, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.args").write_text("--seed 7\n")
    assert parse("@~/my.args").seed == 7


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_recipes_parse(parse, recipe):
    text = recipe.read_text()
    named = re.search(r"train_\w+(?=\.py)", text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every flag of a recipe has an effect
        # the output folder comes last, so that the recipe's own does not win
        args = parse(script=named.group() if named else "train_place", given=[f"@{recipe}"])
    for path in re.findall(r"(?:recipes|assets)/[\w/.]+\w", text):
        if path != "assets/teacher":  # made by the recipe beside it
            assert (ROOT / path).exists(), path
    assert args.dataset_name or args.train_data_dir


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_an_empty_command_line_is_the_embedded_default(tmp_path, monkeypatch, capsys, script, rank):
    monkeypatch.chdir(tmp_path)  # without an earlier run's output; what is bundled is found from anywhere
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    module = SCRIPTS[script]
    args = parse_args(module.__doc__, module.add_method_arguments, [])
    said = capsys.readouterr().out
    recipe = "@assets/default.args" if script == "train_place" else "@assets/default_lift.args"
    assert (recipe in said and "--help" in said) == (rank != "1")
    named = parse_args(module.__doc__, module.add_method_arguments, [recipe])
    assert vars(args) == vars(named) and args.pretrained_model_name_or_path == str(ROOT / "assets/teacher")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("sys.argv", ["train.py"])
    assert vars(parse_args(module.__doc__, module.add_method_arguments)) == vars(named)
    monkeypatch.setattr("sys.argv", ["train.py", recipe, "--seed", "8"])
    assert parse_args(module.__doc__, module.add_method_arguments).seed == 8


# Flags without effect


@pytest.mark.parametrize(
    "flags, script, partner",
    [
        ("--ema_decay 0.5", "train_place", "--use_ema"),
        ("--fuse_lora", "train_place", "--lora_rank"),
        ("--lr_warmup_steps 5", "train_place", "--lr_scheduler"),
        ("--lambda_kd_output 0 --lambda_kd_feat 1 --group_size 4", "train_place", "--lambda_kd_output above 0"),
        ("--lambda_kd_output 0 --output_loss mse", "train_lift", "--lambda_kd_output above 0"),
        ("--output_loss mse --coarse_norm l2", "train_lift", "--output_loss lift"),
        ("--lambda_task 0 --snr_gamma 5", "train_place", "--lambda_task above 0"),
        ("--lambda_task 0 --task_balance 1", "train_place", "--lambda_task above 0"),
        ("--lambda_kd_output 0 --timestep_balance 1", "train_lift", "--lambda_kd_output above 0"),
        ("--feature_mask_sigma 2", "train_place", "--lambda_kd_feat above 0"),
        ("--feature_weighting linear", "train_lift", "--lambda_kd_feat above 0"),
        ("--validation_num_samples 5", "train_place", "--validation_feature_extractor"),
        ("--student_init random --taylor_timesteps 50", "train_place", "--student_init taylor"),
        ("--allow_changed_arguments", "train_place", "--resume_from_checkpoint"),
    ],
)
def test_a_flag_without_effect_is_warned_of(parse, flags, script, partner):
    name = flags.split()[-1] if flags.split()[-1].startswith("--") else flags.split()[-2]
    with pytest.warns(UserWarning, match=f"{name} has no effect.*{partner}"):
        parse(*flags.split(), script=script)


@pytest.mark.parametrize(
    "flags, script",
    [
        ("--use_ema --ema_decay 0.5", "train_place"),
        ("--lr_scheduler cosine --lr_warmup_steps 5", "train_place"),
        ("--group_size 4 --grouping patch --weighting linear", "train_place"),
        ("--lambda_kd_feat 1 --feature_weighting linear --feature_mask_sigma 2", "train_place"),
        ("--output_loss mse", "train_lift"),
        ("--coefficients sample --coarse_norm l2", "train_lift"),
    ],
)
def test_flags_with_effect_are_not(parse, flags, script):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse(*flags.split(), script=script)


def test_a_box_that_is_no_square_may_be_cut_further_and_one_can_be_undone(parse):
    assert parse(*"--crop 5 2 8 9 --center_crop".split()).crop == [5, 2, 8, 9]
    assert parse(*"--crop 5 2 8 8 --center_crop --no-center_crop".split()).crop == [5, 2, 8, 8]
    assert parse("--crop", "5", "2", "8", "8", "--crop", "").crop is None


def test_student_init_goes_with_pruning(parse):
    with pytest.warns(UserWarning, match="--student_init has no effect.*--pruning_ratio"):
        parse("--student_init", "random", given=[*TEACHER, *DATA, *CONFIG])


def test_teacher_flags_go_with_a_teacher(parse):
    with pytest.warns(UserWarning, match="--teacher_dtype has no effect.*--pretrained_model_name_or_path"):
        parse("--teacher_dtype", "bf16", given=[*DATA, *CONFIG, *SCRATCH])


# Help


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_argument_is_explained(script):
    found = actions(script)
    assert len(found) > 60
    for action in found:
        assert action.help and len(action.help) > 10, action.option_strings
        switched = [f"--{action.dest}", f"--no-{action.dest}"]
        assert len(action.option_strings) == 1 or action.dest == "help" or action.option_strings == switched
        # a number's default, where there is one, is named
        if isinstance(action.default, int | float) and not isinstance(action.default, bool) and action.default:
            assert "default" in action.help, action.option_strings


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_renders(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "119")
    with pytest.raises(SystemExit) as stopped:
        call(importlib.import_module(script), ["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for action in actions(script):
        assert action.option_strings[-1] in said
    assert "%" in said and "%%" not in said and "%(" not in said
    assert f"accelerate launch {script}.py" in said
