"""Whether networks cut short say something of training: near initialisation, and not of a network that has learned."""

from __future__ import annotations

from dataclasses import dataclass

from curvcli.curvature.problem import Blocks, Problem

NEAR_START = 1.1  # loss of the network cut to half its depth over the whole's, up to which the cut one means something
CONTEXT = 0.98  # of the tokens' entropy: a loss below it uses their context, as no network near its initialisation does


@dataclass(frozen=True)
class Cut:
    """Mean losses of the first batch.

    Args:
        half: of the network cut to half its depth.
        whole: of the whole network.
        unigram: entropy of the shard's targets by their frequencies, in nats; None where there is none.
    """

    half: float
    whole: float
    unigram: float | None = None

    @classmethod
    def of(cls, problem: Problem, blocks: Blocks, unigram: float | None) -> Cut:
        """Two forward passes: one batch and one depth tell."""
        first = problem.subset(problem.given[0])
        return cls(first.truncated(blocks, len(blocks.modules) // 2).mean_loss(), first.mean_loss(), unigram)

    @property
    def learned(self) -> bool:
        """Whether the whole network uses context."""
        return self.unigram is not None and self.whole < CONTEXT * self.unigram

    @property
    def means(self) -> bool:
        """Whether the networks cut short are measured unless somebody says so."""
        near = self.half <= self.whole + (NEAR_START - 1) * abs(self.whole)  # not where it is no number
        return near and not self.learned

    def why_not(self, *, negated: bool = False) -> str:
        """Why they say nothing.

        Args:
            negated: the losses are minus those that the user knows.
        """
        half, whole = (-self.half, -self.whole) if negated else (self.half, self.whole)
        if self.learned:
            return (
                f"the network's loss is {whole:.3g} where its tokens' frequencies alone give {self.unigram:.3g}: it has "
                "learned, and the curvature of one cut short says nothing of training; --truncated measures it"
            )
        return (
            f"the loss of the network cut to half its depth is {half:.3g} where the whole's is {whole:.3g}: "
            "its curvature says nothing of training; --truncated measures it"
        )
