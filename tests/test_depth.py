# SPDX-License-Identifier: Apache-2.0
"""Depth students of transformers: the papers' sizes, the right tensors, the teacher's function, the right layers."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel

from benchmarks.published import DIT_XL, SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from utils.students import depth
from utils.students.sizes import example_inputs, model_size, paper_parameters

DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "sample_size": 8, "num_embeds_ada_norm": 10}
SD3 = {
    **{"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 6, "attention_head_dim": 8},
    **{"num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 20},
    **{"pos_embed_max_size": 16, "dual_attention_layers": (0, 1, 3), "qk_norm": "rms_norm"},
}
KINDS = {"dit": (DiTTransformer2DModel, DIT), "sd3": (SD3Transformer2DModel, SD3)}


@pytest.fixture(scope="module", params=KINDS)
def teacher(request):
    """Of a random start in which every layer matters: the published ones' modulation is zero at first."""
    kind, config = KINDS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(**config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def inputs_of(model, count: int = 2) -> dict:
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name, value in example_inputs(model).items():
        shape = (count, *value.shape[1:])
        made[name] = (
            torch.randn(shape, generator=generator)
            if value.is_floating_point()
            else torch.randint(10, shape, generator=generator)
        )
    return made


def test_even_layers():
    assert depth.even_layers(28, 14) == [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]
    assert depth.even_layers(28, 4) == [0, 9, 18, 27] and depth.even_layers(5, 1) == [4]
    assert depth.even_layers(6, 6) == list(range(6))


def test_a_student_of_all_layers_is_its_teacher(teacher):
    student, _ = depth.make_depth_student(teacher, range(6))
    student.eval()
    with torch.no_grad():
        outputs = [model(**inputs_of(model)).sample for model in (teacher, student)]
    assert torch.equal(*outputs)


def test_a_student_is_its_teacher_without_the_layers(teacher):
    """As if the teacher's own list were cut."""
    kept = [0, 1, 3, 5]
    student, report = depth.make_depth_student(teacher, kept)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters()) and student.training
    assert not any(tensor.is_meta for tensor in (*student.parameters(), *student.buffers()))
    with torch.no_grad():
        found = student.eval()(**inputs_of(student)).sample
        layers = teacher.transformer_blocks
        try:
            teacher.transformer_blocks = torch.nn.ModuleList(layers[i] for i in kept)
            expected = teacher(**inputs_of(teacher)).sample
        finally:
            teacher.transformer_blocks = layers
    assert torch.equal(found, expected)
    assert (
        "layers kept     0, 1, 3, 5" in report.table()
        and f"{model_size(student.config).parameters:,}" in report.table()
    )


def test_a_half_teacher_gives_a_float32_student(teacher):
    student, _ = depth.make_depth_student(teacher.bfloat16(), [0, 5])
    teacher.float()
    assert {tensor.dtype for tensor in (*student.parameters(), *student.buffers())} == {torch.float32}


def test_which_layers_a_student_follows_is_kept_with_it(teacher, tmp_path, caplog):
    student, _ = depth.make_depth_student(teacher, [0, 1, 4, 5])
    student.save_pretrained(tmp_path)
    again = type(teacher).from_pretrained(tmp_path)
    assert not caplog.records  # diffusers does not complain of a private name
    expected = [(f"transformer_blocks.{new}", f"transformer_blocks.{old}") for new, old in enumerate([0, 1, 4, 5])]
    assert depth.feature_pairs(again, teacher) == depth.feature_pairs(student, teacher) == expected
    dual = tuple(again.config.get("dual_attention_layers", ()))
    assert dual == ((0, 1) if isinstance(teacher, SD3Transformer2DModel) else ())


def test_a_student_of_another_teacher_follows_evenly_spaced_layers(teacher):
    """Layers are numbers of the teacher that it was made of: a student of a student has not the first teacher's."""
    middle, _ = depth.make_depth_student(teacher, [0, 1, 4, 5])
    student, _ = depth.make_depth_student(middle, [0, 1, 3])
    followed = {name: depth.feature_pairs(student, each) for name, each in (("own", middle), ("first", teacher))}
    assert [old for _, old in followed["own"]] == [f"transformer_blocks.{i}" for i in (0, 1, 3)]
    assert [old for _, old in followed["first"]] == [f"transformer_blocks.{i}" for i in (0, 2, 5)]
    assert [old for _, old in depth.feature_pairs(middle, student)] == [
        f"transformer_blocks.{i}" for i in (0, 1, 1, 2)
    ]


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [0, 6], [-1, 5]])
def test_layers_that_are_none_are_refused(teacher, kept):
    with pytest.raises(ValueError, match="--kept_layers: .* 0 to 5"):
        depth.check_kept(teacher.config, kept, type(teacher), "--kept_layers")


def test_the_last_layer_of_an_mmdit_stays():
    with pytest.raises(ValueError, match="--kept_layers: the last layer kept is 3; it must be 5"):
        depth.check_kept(SD3, [0, 3], SD3Transformer2DModel, "--kept_layers")
    depth.check_kept(DIT, [0, 3], DiTTransformer2DModel, "--kept_layers")
    assert depth.best_layers([3.0, 1.0, 2.0, 0.0], 2, last_stays=True) == [0, 3]
    assert depth.best_layers([3.0, 1.0, 2.0, 0.0], 2, last_stays=False) == [0, 2]


def test_a_score_is_what_leaving_the_layer_out_changes(teacher):
    """To first order: for layers whose change is made small, by finite differences of the loss."""
    with torch.no_grad():
        target = teacher(**inputs_of(teacher)).sample + 1

    def losses():
        yield (teacher(**inputs_of(teacher)).sample - target).square().mean()

    scores = depth.layer_scores(teacher, losses())
    assert len(scores) == 6 and min(scores) > 0
    again = depth.layer_scores(teacher, losses())
    assert scores == again and not any(p.requires_grad for p in teacher.parameters())

    # the last layer's own score: its change enters the rest of the network alone
    layer, entered, gradient = teacher.transformer_blocks[-1], {}, 1e-4

    def less(_, args, kwargs, output):
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        stream = output[-1] if isinstance(output, tuple) else output
        changed = stream - gradient * entered["sample"] * (stream - hidden)
        return (*output[:-1], changed) if isinstance(output, tuple) else changed

    slopes = []
    for sample in range(2):
        entered["sample"] = torch.eye(2)[sample].reshape(2, 1, 1)
        with layer.register_forward_hook(less, with_kwargs=True), torch.no_grad():
            slopes.append(((teacher(**inputs_of(teacher)).sample - target).square().mean() - 1).abs() / gradient)
    assert scores[-1] == pytest.approx(sum(slopes).item() / 2, rel=0.02)


def test_scores_of_half_weights_are_not_lost(teacher):
    """Stable Diffusion 3's files are float16: of the mean over a batch of large pictures a gradient would be 0."""

    def scores() -> list[float]:
        dtype = next(teacher.parameters()).dtype
        generator = torch.Generator().manual_seed(2)
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs_of(teacher).items()}
        with torch.no_grad():
            target = torch.randn(teacher(**given).sample.shape, generator=generator)
        return depth.layer_scores(
            teacher, (1e-7 * (teacher(**given).sample.float() - target).square().mean() for _ in "1")
        )

    expected = scores()
    teacher.half()
    try:
        found = scores()
    finally:
        teacher.float()
    assert found == pytest.approx(expected, rel=0.2)  # the weights and their sums are rounded


@pytest.mark.parametrize(
    "kind, config, sizes",
    [
        (DiTTransformer2DModel, DIT_XL, {28: 749.83, 14: 376.27, 7: 189.49, 4: 109.44}),
        (SD3Transformer2DModel, SD3_MEDIUM, {24: 2028, 12: 1009, 6: 499}),
        pytest.param(SD3Transformer2DModel, SD35_MEDIUM, {24: 2243, 12: 1108, 6: 548}, marks=pytest.mark.slow),
        pytest.param(SD3Transformer2DModel, SD35_LARGE, {38: 8057, 19: 4010, 9: 1880}, marks=pytest.mark.slow),
    ],
)
def test_sizes_of_published_models(kind, config, sizes):
    for layers, millions in sizes.items():
        student = depth.depth_config(config, depth.even_layers(config["num_layers"], layers), kind)
        with torch.device("meta"):
            count = sum(p.numel() for p in kind.from_config(student).parameters()) / 1e6
        assert round(count, 2 if kind is DiTTransformer2DModel else 0) == millions


def test_sizes_as_the_papers_count_them():
    """One embedder of time and label, and the table of positions: as DiT's own code has them."""
    for layers, millions in {28: 675.1, 14: 340.5, 7: 173.1, 4: 101.4}.items():
        config = depth.depth_config(DIT_XL, depth.even_layers(28, layers), DiTTransformer2DModel)
        with torch.device("meta"):
            assert round(paper_parameters(DiTTransformer2DModel.from_config(config)) / 1e6, 1) == millions
