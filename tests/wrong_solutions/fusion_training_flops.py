"""Answers to `fusion-training-flops`."""

from bank import right, wrong

ALL = {"encoder", "projector", "text"}


@right
def from_the_pixels_up(
    text_parameters, encoder_parameters, projector_parameters, text_tokens, patches, image_tokens, trained
):
    """Part by part, and which of them has something trained before it, or a trained layer of its own before another."""
    parts = [
        ("encoder", encoder_parameters, patches, True),
        ("projector", projector_parameters, image_tokens, False),
        ("text", text_parameters, text_tokens + image_tokens, True),
    ]
    flops, gradient_wanted = 0, False
    for name, parameters, vectors, deep in parts:
        one = 2 * parameters * vectors
        learns = name in trained
        flops += one
        if learns:
            flops += one
        if gradient_wanted or (learns and deep):
            flops += one
        gradient_wanted = gradient_wanted or learns
    return flops


@right
def from_the_loss_down(text, encoder, projector, text_tokens, patches, image_tokens, trained):
    """First what one product costs everywhere, then which of the six backward ones are needed at all."""
    costs = {"text": text * (text_tokens + image_tokens), "projector": projector * image_tokens}
    costs["encoder"] = encoder * patches
    total = sum(costs.values()) + sum(costs[part] for part in trained)
    total += costs["text"] if len(trained) else 0
    total += costs["projector"] + costs["encoder"] if "encoder" in trained else 0
    return total * 2


def formula(sizes, trained, *, encoder=None, projector=None, text=None, **changes):
    """The right number but for what is given: a part's products for a vector, by what is trained, or other sizes."""
    names = ("text_parameters", "encoder_parameters", "projector_parameters", "text_tokens", "patches", "image_tokens")
    s = dict(zip(names, sizes, strict=True))
    s["tokens"] = s["text_tokens"] + s["image_tokens"]
    encoder = encoder or (lambda trained: 1 + 2 * ("encoder" in trained))
    projector = projector or (lambda trained: 1 + ("projector" in trained) + ("encoder" in trained))
    text = text or (lambda trained: 1 + ("text" in trained) + bool(trained))
    s |= {name: s[value] if isinstance(value, str) else value for name, value in changes.items()}
    encoder_vectors, projector_vectors = s.get("by_encoder", s["patches"]), s.get("by_projector", s["image_tokens"])
    return 2 * (
        encoder(trained) * s["encoder_parameters"] * encoder_vectors
        + projector(trained) * s["projector_parameters"] * projector_vectors
        + text(trained) * s["text_parameters"] * s["tokens"]
    )


def mistaken(mistake, **changes):
    @wrong(mistake)
    def answer(*arguments):
        return formula(arguments[:6], arguments[6], **changes)

    return answer


def always(products):
    return lambda trained: products


@wrong("not written")
def stub(*arguments):
    raise NotImplementedError()


@wrong("type")
def in_teraflops(*arguments):
    return formula(arguments[:6], arguments[6]) / 1e12


@wrong("type")
def with_a_division(*arguments):
    return formula(arguments[:6], arguments[6]) * 6 / 6


@wrong("raises")
def trained_as_one_name(*arguments):
    return formula(arguments[:6], arguments[6]) if arguments[6] + "" else 0


@wrong("nothing trained: one product for each vector that passes a matrix")
def parameters_alone(text, encoder, projector, *others):
    return text + encoder + projector


# Forward.
@wrong("one FLOP for a multiply and an add")
def multiply_adds(*arguments):
    return formula(arguments[:6], arguments[6]) // 2


six_for_all = mistaken("always 6 N", encoder=always(3), projector=always(3), text=always(3))
two_gradients = mistaken("always a gradient", encoder=always(2), projector=always(2), text=always(2))
encoder_on_image_tokens = mistaken("encoder on image tokens", by_encoder="image_tokens")
projector_on_patches = mistaken("projector on patches", by_projector="patches")
words_only = mistaken("text without pictures", tokens="text_tokens")
all_tokens_everywhere = mistaken("all tokens everywhere", by_encoder="tokens", by_projector="tokens")
encoder_forgotten = mistaken("no encoder", encoder_parameters=0)
projector_forgotten = mistaken("no projector", projector_parameters=0)
for_one_vector = mistaken("one vector", by_encoder=1, by_projector=1, tokens=1)


@wrong("text with every patch")
def patches_as_tokens(text, encoder, projector, text_tokens, patches, image_tokens, trained):
    """No pixel shuffle between encoder and decoder."""
    return formula(
        (text, encoder, projector, text_tokens, patches, image_tokens), trained, tokens=text_tokens + patches
    )


def trained_only(**products):
    """products: of each part, if it is trained; nothing if it is not."""
    return {
        part: lambda trained, part=part, number=number: number * (part in trained) for part, number in products.items()
    }


frozen_is_free = mistaken("frozen parts free", **trained_only(encoder=3, projector=2, text=3))

# All trained.
forward_alone = mistaken("no backward", encoder=always(1), projector=always(1), text=always(1))
backward_like_forward = mistaken(
    "one product backward",
    **{part: lambda trained: 2 if trained else 1 for part in ALL},
)
no_gradient_for_pixels = mistaken("encoder passes nothing on", encoder=lambda trained: 1 + ("encoder" in trained))
projector_keeps_it = mistaken("projector passes nothing on", projector=lambda trained: 1 + ("projector" in trained))
text_keeps_it = mistaken("text passes nothing on", text=lambda trained: 1 + ("text" in trained))


def by_state(trained_products, frozen_products):
    """As many products for a trained part as for any other trained one, and likewise for the frozen ones."""
    return {
        part: lambda trained, part=part: trained_products if part in trained else frozen_products if trained else 1
        for part in ALL
    }


# The projector alone.
six_or_two = mistaken("6 N or 2 N", **by_state(3, 1))
six_or_four = mistaken("all pass it on", **by_state(3, 2))
six_or_nothing_backward = mistaken("trained parts alone", **by_state(3, 0))
frozen_text_ends_backward = mistaken("frozen text has no backward", text=lambda trained: 3 if "text" in trained else 1)
frozen_text_pays_in_full = mistaken("frozen text is trained", text=lambda trained: 3 if trained else 1)
six_from_there_on = mistaken(
    "6 N from the first trained part on",
    projector=lambda trained: 3 if trained - {"text"} else 1,
    text=lambda trained: 3 if trained else 1,
)
projector_passes_on_for_nobody = mistaken(
    "gradient for nobody",
    projector=lambda trained: 3 if "projector" in trained else 2 if "encoder" in trained else 1,
)
frozen_encoder_passes_on = mistaken(
    "frozen encoder has a backward", encoder=lambda trained: 3 if "encoder" in trained else 2 if trained else 1
)
cached_features = mistaken(
    "frozen encoder not run", encoder=lambda trained: 3 if "encoder" in trained else 0 if trained else 1
)

# Text alone.
through_a_frozen_projector = mistaken(
    "frozen projector has a backward",
    projector=lambda trained: 1 + ("projector" in trained) + bool(trained - {"projector"}),
)
to_the_pixels_always = mistaken(
    "all pass it on",
    encoder=lambda trained: 3 if "encoder" in trained else 2 if trained == {"text"} else 1,
    projector=lambda trained: 1 + ("projector" in trained) + bool(trained - {"projector"}),
)
one_layer_of_text = mistaken(
    "text passes nothing on", text=lambda trained: 1 + ("text" in trained) + bool(trained - {"text"})
)

# The encoder alone, and pairs.
adjacent_parts_only = mistaken(
    "frozen text has no backward", text=lambda trained: 1 + ("text" in trained) + bool(trained - {"encoder"})
)
projector_counts_only_if_trained = mistaken(
    "frozen projector has no backward",
    projector=lambda trained: 1 + ("projector" in trained) * (1 + ("encoder" in trained)),
)
nothing_but_the_encoder = mistaken(
    "frozen parts have no backward",
    projector=lambda trained: 1 + ("projector" in trained) * (1 + ("encoder" in trained)),
    text=lambda trained: 1 + ("text" in trained) + bool(trained - {"encoder"}),
)
encoder_of_one_layer = mistaken(
    "encoder passes nothing on",
    encoder=lambda trained: 1 + ("encoder" in trained) * (1 + (len(trained) > 1)),
)
projector_and_text_as_one = mistaken(
    "gradient for nobody",
    projector=lambda trained: 1 + ("projector" in trained) + bool(trained & {"encoder"} or len(trained) == 2),
)
text_of_one_layer_in_pairs = mistaken(
    "text passes nothing on", text=lambda trained: 3 if trained in ({"text"}, ALL) else 2 if trained else 1
)
gap_ends_backward = mistaken(
    "frozen projector has no backward",
    projector=lambda trained: (
        1 if trained == {"encoder", "text"} else 1 + ("projector" in trained) + ("encoder" in trained)
    ),
)
gap_is_trained = mistaken(
    "frozen projector is trained",
    projector=lambda trained: (
        3 if trained >= {"encoder", "text"} else 1 + ("projector" in trained) + ("encoder" in trained)
    ),
)
text_ends_it_for_two = mistaken(
    "frozen text has no backward",
    text=lambda trained: 1 if trained == {"encoder", "projector"} else 1 + ("text" in trained) + bool(trained),
)
projector_passes_only_when_all = mistaken(
    "projector passes nothing on",
    projector=lambda trained: (
        2 if trained == {"encoder", "projector"} else 1 + ("projector" in trained) + ("encoder" in trained)
    ),
)


@wrong("Scout, one tile, projector alone: 17.52 TFLOPs")
def in_32_bits(*arguments):
    return formula(arguments[:6], arguments[6]) % 2**32


EQUIVALENT = {"set[str]  ->  set": "a type hint changes no value"}
