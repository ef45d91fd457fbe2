"""What a picture is asked to show: the `Condition` that every dataset yields and every reward sees."""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Condition:
    """One request for an image.

    prompt: the text that rewards read (for a class: "a photo of {name}").
    class_id: the label for class-to-image models, None for text-to-image.
    metadata: what exact scorers need, in GenEval's record format (`tag`, `include`, `exclude`).
    """

    prompt: str
    class_id: int | None = None
    metadata: dict = field(default_factory=dict)
