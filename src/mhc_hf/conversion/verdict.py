"""What a verification found, and whether it is good enough."""

from __future__ import annotations

from dataclasses import dataclass

RATIO_ALLOWED = 1.05  # in bfloat16 and float16: distance from the float32 base, over the base's own


@dataclass(frozen=True)
class VerificationReport:
    """Outcome of `verify_conversion`; true where everything is as it should be, and `str()` of it is made to be read.

    Attributes:
        text: what was run through both models.
        tokens: how many tokens of it, beside the continuations.
        dtype: in which the models ran.
        max_difference: max |dlogit|, over the text and over every step of the cached continuations.
        max_logit: largest |logit| of the base.
        tolerance: what max_difference / max_logit may be; float32 only.
        distance_ratio: root mean square distance of the conversion's logits from the float32 base's, over the distance
            of the base's own; None in float32.
        agreement: at how many steps of the continuations both models choose the same token.
        steps: how many steps there were.
        float32: whether every mHC parameter is float32, stored and loaded.
        asleep: sites whose streams cannot separate, with the reason.
        sites: number of sites.
        changed: base tensors that are missing from the conversion or differ in a bit.
        stray_keys: keys missing from the converted checkpoint, or unexpected in it, that were not so in the base.
        same_tokenizer: whether both tokenizers give the same ids; None where there is none.
    """

    text: str
    tokens: int
    dtype: str
    max_difference: float
    max_logit: float
    tolerance: float
    distance_ratio: float | None
    agreement: int
    steps: int
    float32: bool
    asleep: dict[str, str]
    sites: int
    changed: list[str]
    stray_keys: list[str]
    same_tokenizer: bool | None

    @property
    def same_function(self) -> bool:
        if self.distance_ratio is not None:
            return self.distance_ratio <= RATIO_ALLOWED
        return self.max_difference <= self.tolerance * self.max_logit

    def __bool__(self) -> bool:
        sound = self.float32 and not (self.asleep or self.changed or self.stray_keys)
        return self.same_function and sound and self.same_tokenizer is not False

    def __str__(self) -> str:
        relative = self.max_difference / self.max_logit if self.max_logit else float("inf")
        limit = f"allowed {self.tolerance:.0e}" if self.distance_ratio is None else "rounding of both models"
        lines = [
            f"text            {self.text}, {self.tokens} tokens, {self.dtype}",
            f"max |dlogit|    {self.max_difference:.2e}, relative {relative:.2e} ({limit})",
        ]
        if self.distance_ratio is not None:
            ratio = f"{self.distance_ratio:.3f} times the base's own (allowed {RATIO_ALLOWED})"
            lines.append(f"distance        from the float32 base {ratio}")
        lines += [
            f"continuations   {self.agreement} of {self.steps} tokens chosen alike, step by step through the cache",
            f"mHC parameters  {'float32' if self.float32 else 'NOT float32'}",
            f"streams         {_streams(self.sites, self.asleep)}",
            f"base tensors    {_count(self.changed, 'unchanged, bit for bit', 'MISSING OR CHANGED')}",
            f"keys            {_count(self.stray_keys, 'none missing, none unexpected', 'MISSING OR UNEXPECTED')}",
            f"tokenizer       { {None: 'none', True: 'same ids', False: 'OTHER IDS'}[self.same_tokenizer] }",
            "verified" if self else "NOT VERIFIED",
        ]
        return "\n".join(lines)


def _count(names: list[str], good: str, bad: str) -> str:
    return f"{len(names)} {bad}, such as {names[0]}" if names else good


def _streams(sites: int, asleep: dict[str, str]) -> str:
    if not asleep:
        return f"can separate at all {sites} sites"
    site, reason = next(iter(asleep.items()))
    return f"CANNOT SEPARATE at {len(asleep)} of {sites} sites, such as {site}: {reason}"
