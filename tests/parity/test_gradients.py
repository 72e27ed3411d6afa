"""The same gradients as Hugging Face, for every single parameter: what a training step learns from."""

import pytest
import torch.nn.functional as F
from partner import our_name
from tiny_models import TOLERANCE, picture_prompt, relative_error, words


@pytest.mark.parametrize("pictures", [False, True], ids=["text", "pictures"])
def test_the_gradient_of_every_parameter_equals_hugging_face(pair, pictures):
    """Cross-entropy of the next token; each parameter is compared on its own, so that no small one hides."""
    ids, pixels = picture_prompt(rows=2) if pictures else (words(67, rows=2), None)
    ours, theirs = gradients(pair.ours, ids, pixels), gradients(pair.theirs, ids, pixels)
    theirs = {our_name(name): gradient for name, gradient in theirs.items()}
    assert ours.keys() == theirs.keys()
    without = {name for name in ours if ours[name] is None}
    assert without == {name for name in theirs if theirs[name] is None}
    assert all("vision" in name or "projector" in name for name in without) and bool(without) != pictures
    errors = {name: relative_error(ours[name], theirs[name]) for name in ours.keys() - without}
    assert any("router" in name for name in errors) and any("experts.gate_up_proj" in name for name in errors)
    worst = max(errors, key=errors.get)
    print(f"worst of {len(errors)}: {worst} {errors[worst]:.1e}")
    assert errors[worst] < TOLERANCE, f"{worst}: relative error {errors[worst]:.1e}"


def gradients(model, ids, pixels):
    model.zero_grad(set_to_none=True)
    pictures = {} if pixels is None else {"pixel_values": pixels}
    logits = model(input_ids=ids, **pictures)
    logits = getattr(logits, "logits", logits)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found
