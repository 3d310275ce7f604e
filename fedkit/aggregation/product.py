"""The mean of the products of LoRA factors, brought back to factors by a truncated SVD.

J. Bai, D. Chen, B. Qian, L. Yao and Y. Li, "Federated Fine-tuning of Large Language Models under Heterogeneous
Tasks and Client Resources" (FlexLoRA), 2024, https://arxiv.org/abs/2402.11505, equations 3 to 5; HLoRA does the
same. Clients may hold any rank: each is sent the leading components.

==========  ===================================  =====================================
paper       meaning                              here
==========  ===================================  =====================================
Wᵢ = BᵢAᵢ   a client's product after training    what it was sent + its update
W_g         Σ wᵢWᵢ                               `fedkit.aggregation.lora.Products`
SVD(W_g)    U, Σ, V, truncated                   `fedkit.aggregation.lora.factors`
==========  ===================================  =====================================

Deviations from the paper
-------------------------
The singular values are split between B and A, and the rows of A never get shorter than they began: see `factors`.
No matrix of a layer's size is formed unless it is smaller than the factors (`ProductSum`). Arrays other than LoRA
factors are averaged.

With `updates`, which is our own, the changes of the products are averaged and added to the previous product: ``W_g
+ Σ wᵢ (Wᵢ − what i was sent)``. This is the same if all ranks are. If they are not, a client that holds fewer
components no longer counts as one that wants the others to be zero, which would shrink them in every round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fedkit.aggregation.lora import LORA_GAP, Products, factors
from fedkit.aggregation.mean import Mean
from fedkit.aggregation.protocol import Aggregate, Cohort, Upload
from fedkit.arrays import NamedArrays


@dataclass(frozen=True, slots=True)
class ProductMean:
    """Averages the products of LoRA factors rather than the factors. It has no state."""

    weighted: bool = True  # by number of examples; False: every client counts the same
    updates: bool = False  # whether the changes of the products are averaged, rather than the products

    def init(self, params: NamedArrays) -> None:
        """Return nothing: there is nothing to remember."""

    def __call__(
        self, params: NamedArrays, cohort: Cohort, uploads: Iterable[Upload], state: None
    ) -> Aggregate[None]:
        """Return factors of the mean product, the means of all other arrays, and what the truncation lost."""
        products = Products(params)
        mean = Mean(self.weighted)(params, cohort, self._seen(uploads, cohort, products), None)
        if not products.total:
            return mean
        if self.updates:
            products.shift(products.total, params)
        new = dict(mean.params)
        for pair, product in products.means().items():
            a = params[pair.a]
            left, right = factors(product, len(a), a)
            new[pair.a], new[pair.b] = right.reshape(a.shape), left.reshape(params[pair.b].shape)
        return Aggregate(new, None, {LORA_GAP: products.gap(new)})

    def _seen(self, uploads: Iterable[Upload], cohort: Cohort, products: Products) -> Iterator[Upload]:
        """Yield the uploads, and add each to the products on the way."""
        for upload in uploads:
            if upload.arrays is not None:
                weight = upload.num_examples if self.weighted else 1.0
                sent = cohort.sent[upload.node_id]
                products.add(weight, sent, upload.arrays)
                if self.updates:
                    products.shift(-weight, sent)
            yield upload
