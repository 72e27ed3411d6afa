"""FLOPs of one training step, by which parts are trained: what a frozen part still costs."""

import random

import torch

from ..exercise import Card, as_published, runs, same
from ..observe import call

CARD = Card(
    "01",
    "FLOPs of a training step",
    difficulty=3,
    importance=5,
    minutes=20,
    trains="backpropagation, what freezing saves",
)

HINTS = (
    "Three products belong to a matrix: the output forward, and backward the gradient of its weights and the gradient "
    "of its inputs. Each costs 2 N for a vector. For each part ask three times: who needs this one?",
    "All parts run forward. Only a trained part needs the gradient of its weights. The gradient of its inputs is for "
    "those that come before it: it is needed if anything before the part is trained, and in the deep parts, encoder "
    "and text, if the part itself is. How many vectors pass each part?",
    "Products for a vector. Encoder: 1, or 3 if it is trained. Projector: 1, and 1 if it is trained, and 1 if the "
    "encoder is. Text: 1, and 1 if it is trained, and 1 if anything is. Each is 2 N, for `patches` vectors, "
    "`image_tokens`, and `text_tokens + image_tokens`.",
)

ANSWERED_BY = ()

PARTS = ("encoder", "projector", "text")  # from the pixels up

SCOUT = {
    "text_parameters": 16_138_408_960,  # of one token, without the embedding
    "encoder_parameters": 850_960_896,
    "projector_parameters": 20_971_520,
    "text_tokens": 112, "patches": 576, "image_tokens": 144,
}  # fmt: skip
KNOWN = {
    "Scout, one tile, projector alone: 17.52 TFLOPs": (("projector",), 17_518_117_322_752),
    "Scout, one tile, all trained: 27.75 TFLOPs": (PARTS, 27_747_636_412_416),
}


def draw(rng: random.Random) -> dict:
    """Sizes of a real little network, for which no two known mistakes give the same number."""
    encoder_width, width = rng.choice((11, 13)), rng.choice((29, 31, 37))
    encoder_layers, layers = rng.choice((5, 7)), rng.choice((8, 9, 10))
    block = rng.choice((2, 3))
    image_tokens = rng.choice((17, 19, 23))
    return {
        "network": (encoder_width, encoder_layers, block, width, layers),
        "sizes": {
            "text_parameters": layers * width**2,
            "encoder_parameters": encoder_layers * encoder_width**2,
            "projector_parameters": block**2 * encoder_width * width,
            "text_tokens": rng.choice((41, 43, 47)),
            "patches": block**2 * image_tokens,
            "image_tokens": image_tokens,
        },
    }


def observe(function, inputs: dict) -> dict:
    seen = {}
    for trained in CASES:
        seen |= call(_name(trained), function, *inputs["sizes"].values(), set(trained))
    for name, (trained, _) in KNOWN.items():
        seen |= call(name, function, *SCOUT.values(), set(trained))
    return seen


def _name(trained: tuple[str, ...]) -> str:
    return " and ".join(trained) or "nothing"


# What is trained -> what is right when that comes out, the question for any other answer, and known mistakes: how many
# products each part does for a vector in them (encoder, projector, text), 1 to 3, or 0 if it does not even run forward.
CASES = {
    (): (
        "nothing trained: one product for each vector that passes a matrix",
        "Set sizes to 1 one by one: by how much does your number shrink? Which vectors pass which part?",
        {
            (0, 0, 0): ("frozen parts free", "Can the loss be had without running the frozen parts forward?"),
            (3, 3, 3): ("always 6 N", "Nothing is trained here. What does your function do with `trained`?"),
            (2, 2, 2): ("always a gradient", "Nothing is trained here. Who would use a gradient?"),
        },
    ),
    ("encoder", "projector", "text"): (
        "all trained: three products for each vector, 6 N",
        "y = W x. Which two products make the gradients of W and of x out of the gradient of y?",
        {
            (1, 1, 1): ("no backward", "How many products does a trained matrix cost on the way back?"),
            (2, 2, 2): ("one product backward", "Backward, W gets a gradient, and so does x. Is that one product?"),
            (2, 3, 3): (
                "encoder passes nothing on",
                "Pixels need no gradient. But do the outputs of the encoder's first layer, which is trained?",
            ),
            (3, 3, 2): ("text passes nothing on", "How does the gradient get to what lies below the text model?"),
            (3, 2, 3): ("projector passes nothing on", "What is before the projector, and is it trained here?"),
        },
    ),
    ("projector",): (
        "projector alone: the gradient comes to it through the frozen text model",
        "Loss, text model, projector: which products does the gradient need on its way, and which have no use?",
        {
            (1, 2, 1): ("frozen text has no backward", "How does the projector hear of the loss, and through what?"),
            (1, 3, 1): ("6 N or 2 N", "How does the projector hear of the loss, and through what?"),
            (1, 2, 3): ("frozen text is trained", "Whose weights is the third product of the text model for?"),
            (1, 3, 3): ("6 N from the first trained part on", "Which parts get no new weights here?"),
            (1, 3, 2): ("gradient for nobody", "The projector is one matrix. Who wants the gradient of its inputs?"),
            (2, 2, 2): ("frozen encoder has a backward", "Is there anything trained in the encoder, or before it?"),
            (2, 3, 2): ("all pass it on", "Is there anything trained in the encoder, or before it?"),
            (0, 2, 0): ("frozen parts free", "Can the loss be had without running the frozen parts forward?"),
            (0, 3, 0): ("trained parts alone", "Can the loss be had without running the frozen parts forward?"),
            (0, 2, 2): ("frozen encoder not run", "Where do the projector's inputs come from, for a new picture?"),
        },
    ),
    ("text",): (
        "text alone: nothing before it has a backward",
        "All that is trained lies in the text model. Where may the gradient stop on its way down?",
        {
            (1, 1, 2): ("text passes nothing on", "48 layers: who needs the gradient of the last one's inputs?"),
            (1, 2, 3): ("frozen projector has a backward", "Is anything trained in the projector, or before it?"),
            (2, 2, 3): ("all pass it on", "Who would use the gradients of projector and encoder?"),
        },
    ),
    ("encoder",): (
        "encoder alone: the gradient comes to it through two frozen parts",
        "Write down who needs what on the way from the loss to the encoder's first layer. Which of it has no use?",
        {
            (3, 1, 1): ("frozen parts have no backward", "How does the encoder hear of the loss, and through what?"),
            (3, 2, 1): ("frozen text has no backward", "Where does the projector get its gradient from?"),
            (3, 1, 2): ("frozen projector has no backward", "What lies between the text model and the encoder?"),
            (2, 2, 2): ("encoder passes nothing on", "Does the second encoder layer need a gradient of its inputs?"),
        },
    ),
    ("projector", "text"): (
        "projector and text: the encoder has no backward",
        "Which of the three parts has something trained before it?",
        {
            (1, 3, 3): ("gradient for nobody", "The projector is one matrix. Who wants the gradient of its inputs?"),
            (2, 2, 3): ("frozen encoder has a backward", "Is there anything trained in the encoder, or before it?"),
            (1, 2, 2): ("text passes nothing on", "How does the gradient get from the loss to the projector?"),
        },
    ),
    ("encoder", "text"): (
        "encoder and text: a frozen projector between them passes the gradient on",
        "The projector is frozen. How does the encoder hear of the loss, and through what?",
        {
            (3, 1, 3): ("frozen projector has no backward", "What lies between the text model and the encoder?"),
            (3, 3, 3): ("frozen projector is trained", "Which of the projector's three products has no use here?"),
        },
    ),
    ("encoder", "projector"): (
        "encoder and projector: a frozen text model passes the gradient on",
        "The text model is frozen. How do the others hear of the loss, and through what?",
        {
            (3, 3, 1): ("frozen text has no backward", "Where does the projector get its gradient from?"),
            (3, 2, 2): ("projector passes nothing on", "What is before the projector, and is it trained here?"),
        },
    ),
}  # fmt: skip


def judge(inputs: dict, observed: dict):
    sizes = inputs["sizes"]
    for trained, (step, question, known) in CASES.items():
        name, given = _name(trained), _given(sizes, trained)
        yield from runs(observed, name, (), given, dtype="int")
        mistakes = {mistake: (_count(sizes, products), asks) for products, (mistake, asks) in known.items()}
        if not trained:
            mistakes |= _wrong_vectors(sizes)
        yield same(step, observed[f"{name}/value"], truth(inputs, trained), given, question, mistakes)
    for name, (trained, number) in KNOWN.items():
        given = _given(SCOUT, trained)
        yield from as_published(name, observed, number, given)


def _given(sizes: dict, trained: tuple[str, ...]) -> str:
    return ", ".join(f"{key} {value:,}" for key, value in sizes.items()) + f", trained: {_name(trained)}"


def truth(inputs: dict, trained: tuple[str, ...]) -> int:
    """Counted in a real step of a real network of these sizes, of square matrices around the projector.

    The words are rows of the text model's own embedding. The pixels of a trained encoder ask for a gradient as well,
    since 6 N counts its first matrix like all others.
    """
    encoder_width, encoder_layers, block, width, layers = inputs["network"]
    sizes, flops = inputs["sizes"], []

    def part(name: str, x: torch.Tensor, rows: int, columns: int, depth: int) -> torch.Tensor:
        for _ in range(depth):
            x = Product.apply(x, torch.ones(rows, columns, requires_grad=name in trained), flops)
        return x

    x = torch.ones(sizes["patches"], encoder_width, requires_grad="encoder" in trained)
    x = part("encoder", x, encoder_width, encoder_width, encoder_layers)
    x = x.view(sizes["image_tokens"], -1)  # block x block patches side by side
    x = part("projector", x, block**2 * encoder_width, width, 1)
    x = torch.cat([x, torch.ones(sizes["text_tokens"], width, requires_grad="text" in trained)])
    loss = part("text", x, width, width, layers).sum()
    if trained:
        loss.backward()
    return sum(flops)


class Product(torch.autograd.Function):
    """x @ weight, which writes down the FLOPs of the products that autograd really asks for."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, flops: list[int]) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.flops = flops
        flops.append(2 * len(x) * weight.numel())
        return x @ weight

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, weight = ctx.saved_tensors
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.flops += [2 * len(x) * weight.numel()] * (for_x + for_weight)
        return grad @ weight.T if for_x else None, x.T @ grad if for_weight else None, None


def _count(sizes: dict, products: tuple[int, int, int], **changes: int) -> int:
    """2 N for each product of each vector. changes: other numbers of vectors for a part."""
    vectors = {
        "encoder": sizes["patches"],
        "projector": sizes["image_tokens"],
        "text": sizes["text_tokens"] + sizes["image_tokens"],
    } | changes
    return sum(
        2 * number * sizes[f"{part}_parameters"] * vectors[part] for part, number in zip(PARTS, products, strict=True)
    )


def _wrong_vectors(sizes: dict) -> dict:
    forward, words, patches, image = (1, 1, 1), sizes["text_tokens"], sizes["patches"], sizes["image_tokens"]
    everything = dict.fromkeys(PARTS, words + image)
    return {
        "one FLOP for a multiply and an add": (
            _count(sizes, forward) // 2, "A product of two numbers and a sum: how many operations for each parameter?",
        ),
        "encoder on image tokens": (
            _count(sizes, forward, encoder=image), "How many vectors does the encoder work on: before pixel shuffle, "
            "or after it?",
        ),
        "projector on patches": (
            _count(sizes, forward, projector=patches), "Is the projector before pixel shuffle, or after it?",
        ),
        "text without pictures": (
            _count(sizes, forward, text=words), "What does the decoder see of a picture? As how many tokens?",
        ),
        "text with every patch": (
            _count(sizes, forward, text=words + patches), "How many tokens of a picture reach the decoder?",
        ),
        "all tokens everywhere": (_count(sizes, forward, **everything), "Do words pass the encoder?"),
        "no encoder": (_count(sizes, (0, 1, 1)), "Which of the three parts' parameters are in your sum?"),
        "no projector": (_count(sizes, (1, 0, 1)), "Which of the three parts' parameters are in your sum?"),
        "one vector": (
            _count(sizes, forward, encoder=1, projector=1, text=1), "How many vectors pass each of the parts?",
        ),
    }  # fmt: skip
