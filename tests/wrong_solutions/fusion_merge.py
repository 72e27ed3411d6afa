"""Answers to `fusion-merge`."""

import torch
from bank import right, wrong

from minillama4 import fusion


def checked(embeddings, input_ids, image_embeddings, patch_token):
    """(places in the batch as one row, vectors), or the ValueError."""
    places = (input_ids.flatten() == patch_token).nonzero().flatten()
    vectors = image_embeddings.flatten(0, 1)
    if len(places) != len(vectors):
        raise ValueError(f"{len(places)} patch tokens, but {len(vectors)} vectors")
    return places, vectors


def write(embeddings, places, vectors):
    flat = embeddings.flatten(0, 1)
    return flat.index_copy(0, places, vectors.to(flat.dtype)).view_as(embeddings)


@right
def by_counting(embeddings, input_ids, image_embeddings, patch_token):
    """Each patch token's number among all of them picks its vector."""
    here = input_ids == patch_token
    vectors = image_embeddings.reshape(-1, embeddings.shape[-1]).type_as(embeddings)
    if here.sum().item() != vectors.shape[0]:
        raise ValueError(f"need {here.sum().item()} vectors and got {vectors.shape[0]}")
    if len(vectors) == 0:
        return embeddings
    number = (here.flatten().cumsum(0) - 1).clamp_min(0).view_as(input_ids)
    return torch.where(here[..., None], vectors[number], embeddings)


@right
def by_assignment_into_a_copy(embeddings, input_ids, image_embeddings, patch_token):
    _, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    out = embeddings.clone()
    out[input_ids == patch_token] = vectors.to(out.dtype)
    return out


@wrong("not written")
def stub(embeddings, input_ids, image_embeddings, patch_token):
    raise NotImplementedError()


@wrong("raises")
def indexes_a_number(embeddings, input_ids, image_embeddings, patch_token):
    here = input_ids == patch_token[None]
    return embeddings.masked_scatter(here, image_embeddings)


@wrong("raises")
def released_id_by_heart(embeddings, input_ids, image_embeddings, patch_token):
    places, vectors = checked(embeddings, input_ids, image_embeddings, 200092)
    return write(embeddings, places, vectors)


@wrong("put beside the words")
def in_front(embeddings, input_ids, image_embeddings, patch_token):
    """As in h = Transformer([e_img..., e_txt...]), with the placeholders left in."""
    pictures = image_embeddings.view(len(embeddings), -1, embeddings.shape[-1])
    return torch.cat([pictures, embeddings], dim=1)


@wrong("shape")
def flat(embeddings, input_ids, image_embeddings, patch_token):
    places, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    return write(embeddings, places, vectors).flatten(0, 1)


@wrong("shape")
def pictures_alone(embeddings, input_ids, image_embeddings, patch_token):
    return image_embeddings.flatten(0, 1)[None]


@wrong("changes its input")
def in_place(embeddings, input_ids, image_embeddings, patch_token):
    _, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    embeddings[input_ids == patch_token] = vectors.to(embeddings.dtype)
    return embeddings


@wrong("changes its input")
def scattered_in_place(embeddings, input_ids, image_embeddings, patch_token):
    _, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    return embeddings.masked_scatter_((input_ids == patch_token)[..., None], vectors.to(embeddings.dtype))


@wrong("nothing written")
def assigned_into_a_copy_of_a_copy(embeddings, input_ids, image_embeddings, patch_token):
    """Indexing with a mask makes a copy: what is written there is lost."""
    _, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    embeddings[input_ids == patch_token].copy_(vectors)
    return embeddings


@wrong("added")
def added(embeddings, input_ids, image_embeddings, patch_token):
    places, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    return embeddings.flatten(0, 1).index_add(0, places, vectors.to(embeddings.dtype)).view_as(embeddings)


@wrong("words lost")
def into_zeros(embeddings, input_ids, image_embeddings, patch_token):
    places, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    return write(torch.zeros_like(embeddings), places, vectors)


@wrong("<|image_start|> and <|image|> as well")
def over_all_special_tokens(embeddings, input_ids, image_embeddings, patch_token):
    special = (input_ids.flatten() >= patch_token - 12).nonzero().flatten()
    vectors = image_embeddings.flatten(0, 1)
    return write(embeddings, special[: len(vectors)], vectors)


@wrong("one row too early")
def from_the_image_token_on(embeddings, input_ids, image_embeddings, patch_token):
    """`<|image|>` comes right before the patches of a picture of one tile."""
    places, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    return write(embeddings, places - 1, vectors)


@wrong("one row too late")
def counted_from_one(embeddings, input_ids, image_embeddings, patch_token):
    places, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    return write(embeddings, places + 1, vectors)


@wrong("at the front")
def over_the_first_rows(embeddings, input_ids, image_embeddings, patch_token):
    places, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    return write(embeddings, torch.arange(len(places)), vectors)


@wrong("backwards")
def taken_from_the_end(embeddings, input_ids, image_embeddings, patch_token):
    places, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    waiting = list(vectors)
    return write(embeddings, places, torch.stack([waiting.pop() for _ in places]))


@wrong("one vector for all")
def first_vector_everywhere(embeddings, input_ids, image_embeddings, patch_token):
    return torch.where((input_ids == patch_token)[..., None], image_embeddings[0, 0], embeddings)


@wrong("their mean")
def pooled(embeddings, input_ids, image_embeddings, patch_token):
    places, _ = checked(embeddings, input_ids, image_embeddings, patch_token)
    pooled = image_embeddings.mean(1, keepdim=True).expand_as(image_embeddings)
    return write(embeddings, places, pooled.flatten(0, 1))


@wrong("patch tokens become the picture's vectors, and all others stay what they were")
def half_of_each(embeddings, input_ids, image_embeddings, patch_token):
    places, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    return (embeddings + write(embeddings, places, vectors)) / 2


@wrong("one block")
def as_one_run(embeddings, input_ids, image_embeddings, patch_token):
    """From the first patch token on, as many rows as there are vectors: right as long as there is one tile."""
    places, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    return write(embeddings, places[0] + torch.arange(len(vectors)), vectors)


@wrong("first tile only")
def first_run_only(embeddings, input_ids, image_embeddings, patch_token):
    places, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    first = places - places[0] < image_embeddings.shape[1]
    return write(embeddings, places[first], vectors[first])


@wrong("the first tile three times")
def one_tile_by_heart(embeddings, input_ids, image_embeddings, patch_token):
    places, _ = checked(embeddings, input_ids, image_embeddings, patch_token)
    number = torch.arange(len(places)) % image_embeddings.shape[1]
    return write(embeddings, places, image_embeddings[0, number])


@wrong("last tile first")
def tiles_from_the_end(embeddings, input_ids, image_embeddings, patch_token):
    places, vectors = checked(embeddings, input_ids, image_embeddings.flip(0), patch_token)
    return write(embeddings, places, vectors)


@wrong("global tile first")
def overview_first(embeddings, input_ids, image_embeddings, patch_token):
    places, vectors = checked(embeddings, input_ids, image_embeddings.roll(1, 0), patch_token)
    return write(embeddings, places, vectors)


@wrong("tiles interleaved")
def transposed(embeddings, input_ids, image_embeddings, patch_token):
    places, vectors = checked(embeddings, input_ids, image_embeddings.transpose(0, 1), patch_token)
    return write(embeddings, places, vectors)


@wrong("each row from the start")
def row_by_row(embeddings, input_ids, image_embeddings, patch_token):
    vectors, rows = image_embeddings.flatten(0, 1), []
    for row, ids in zip(embeddings, input_ids, strict=True):
        rows.append(row.masked_scatter((ids == patch_token)[:, None], vectors.to(row.dtype)))
    return torch.stack(rows)


@wrong("first row only")
def batch_of_one(embeddings, input_ids, image_embeddings, patch_token):
    places = (input_ids[0] == patch_token).nonzero().flatten()
    return write(embeddings, places, image_embeddings.flatten(0, 1)[: len(places)])


@wrong("last row first")
def batch_from_the_end(embeddings, input_ids, image_embeddings, patch_token):
    places, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    row = places // input_ids.shape[1]
    return write(embeddings, places[(-row).argsort(stable=True)], vectors)


@wrong("column by column")
def positions_first(embeddings, input_ids, image_embeddings, patch_token):
    _, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    position, row = (input_ids.T == patch_token).nonzero(as_tuple=True)
    return embeddings.index_put((row, position), vectors.to(embeddings.dtype))


@wrong("raises")
def always_a_picture(embeddings, input_ids, image_embeddings, patch_token):
    places, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    assert len(places), "no picture"
    return write(embeddings, places, vectors)


@wrong("words without gradient")
def detached_copy(embeddings, input_ids, image_embeddings, patch_token):
    places, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    return write(embeddings.detach().clone(), places, vectors)


@wrong("pictures without gradient")
def data_of_the_pictures(embeddings, input_ids, image_embeddings, patch_token):
    """As if the encoder were frozen for good."""
    places, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    return write(embeddings, places, vectors.data)


@wrong("the gradient reaches the words")
def for_inference(embeddings, input_ids, image_embeddings, patch_token):
    with torch.no_grad():
        return write(embeddings, *checked(embeddings, input_ids, image_embeddings, patch_token))


@wrong("type")
def promoted(embeddings, input_ids, image_embeddings, patch_token):
    """float32 wherever one of the two is."""
    dtype = torch.promote_types(embeddings.dtype, image_embeddings.dtype)
    return write(embeddings.to(dtype), *checked(embeddings, input_ids, image_embeddings, patch_token))


@wrong("raises")
def dtypes_not_brought_together(embeddings, input_ids, image_embeddings, patch_token):
    _, vectors = checked(embeddings, input_ids, image_embeddings, patch_token)
    return embeddings.masked_scatter((input_ids == patch_token)[..., None], vectors)


@wrong("truncated")
def left_over_vectors_dropped(embeddings, input_ids, image_embeddings, patch_token):
    """What masked_scatter does by itself: too few are a RuntimeError, too many are nobody's business."""
    here = (input_ids == patch_token)[..., None]
    return embeddings.masked_scatter(here, image_embeddings.flatten(0, 1).to(embeddings.dtype))


@wrong("truncated")
def as_many_as_fit(embeddings, input_ids, image_embeddings, patch_token):
    """The slice that hides a mismatch: [:n]."""
    places = (input_ids.flatten() == patch_token).nonzero().flatten()
    vectors = image_embeddings.flatten(0, 1)
    return write(embeddings, places[: len(vectors)], vectors[: len(places)])


@wrong("made do")
def repeated_from_the_start(embeddings, input_ids, image_embeddings, patch_token):
    places = (input_ids.flatten() == patch_token).nonzero().flatten()
    vectors = image_embeddings.flatten(0, 1)
    if len(vectors) > len(places):
        raise ValueError(f"{len(vectors)} vectors for {len(places)} patch tokens")
    if not len(places):
        return embeddings
    return write(embeddings, places, vectors[torch.arange(len(places)) % len(vectors)])


@wrong("broadcast")
def a_single_vector_for_all(embeddings, input_ids, image_embeddings, patch_token):
    """Assignment into a mask refuses other counts by itself, but not one row."""
    here, vectors = input_ids == patch_token, image_embeddings.flatten(0, 1).to(embeddings.dtype)
    out = embeddings.clone()
    try:
        out[here] = vectors
    except RuntimeError:
        raise ValueError(f"{here.sum()} patch tokens and {len(vectors)} vectors") from None
    return out


@wrong("another error")
def torchs_own_error(embeddings, input_ids, image_embeddings, patch_token):
    out = embeddings.clone()
    out[input_ids == patch_token] = image_embeddings.flatten(0, 1).to(out.dtype)
    return out


@wrong("another error")
def asserted(embeddings, input_ids, image_embeddings, patch_token):
    places = (input_ids.flatten() == patch_token).nonzero().flatten()
    vectors = image_embeddings.flatten(0, 1)
    assert len(places) == len(vectors), f"{len(places)} patch tokens, {len(vectors)} vectors"
    return write(embeddings, places, vectors)


@wrong("no counts")
def no_numbers(embeddings, input_ids, image_embeddings, patch_token):
    try:
        return by_assignment_into_a_copy(embeddings, input_ids, image_embeddings, patch_token)
    except ValueError:
        raise ValueError("image features and image tokens do not match") from None


@wrong("no counts")
def counts_elements(embeddings, input_ids, image_embeddings, patch_token):
    """As a message of transformers once did: tokens on one side, tokens times channels on the other."""
    try:
        return by_assignment_into_a_copy(embeddings, input_ids, image_embeddings, patch_token)
    except ValueError:
        tokens = (input_ids == patch_token).sum()
        raise ValueError(f"tokens: {tokens}, features: {image_embeddings.numel()}") from None


@wrong("borrowed")
def from_the_package(embeddings, input_ids, image_embeddings, patch_token):
    return fusion.merge_image_embeddings(embeddings, input_ids, image_embeddings, patch_token)


EQUIVALENT = {}
