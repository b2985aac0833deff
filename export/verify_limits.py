"""How far from its reference a GGUF of each type may be: mean KL divergence in nats per token."""

from export.gguf_header import GgufHeader

# First where rows are multiples of 256, then where they are not; those are small models, which
# rounding hurts more. F16, Q8_0 and Q4_K_M are fixed by the certificate's contract. The other
# first values are about twice what llama.cpp measured for Llama-3-8B (tools/perplexity/README.md,
# the worse of with and without imatrix), rounded. Second values: measured on SmolLM2-135M (rows of
# 576): Q8_0 0.004, Q6_K 0.011, Q5_0 and Q5_K_M 0.088, Q5_1 0.12, Q4_K_M 0.06, IQ4_NL 0.22, IQ4_XS
# 0.22; below that they are estimates.
KL_LIMITS = {
    "F32": (1e-3, 1e-3),
    "F16": (1e-3, 1e-3),
    "BF16": (5e-3, 5e-3),
    "Q8_0": (5e-3, 0.02),
    "Q6_K": (0.01, 0.05),
    "Q5_K_M": (0.02, 0.15),
    "Q5_K_S": (0.03, 0.15),
    "Q5_1": (0.04, 0.2),
    "Q5_0": (0.05, 0.15),
    "Q4_K_M": (0.05, 0.15),
    "Q4_K_S": (0.08, 0.2),
    "IQ4_NL": (0.08, 0.35),
    "IQ4_XS": (0.08, 0.35),
    "Q4_1": (0.15, 0.25),
    "Q4_0": (0.15, 0.25),
    "Q3_K_L": (0.18, 0.8),
    "Q3_K_M": (0.2, 0.8),
    "IQ3_M": (0.2, 0.5),
    "IQ3_S": (0.22, 0.5),
    "IQ3_XS": (0.28, 0.6),
    "IQ3_XXS": (0.37, 0.8),
    "Q3_K_S": (0.45, 0.8),
    "IQ2_M": (0.65, 1.2),
    "Q2_K": (0.9, 1.2),
    "Q2_K_S": (0.85, 1.2),
    "IQ2_S": (0.9, 1.5),
    "IQ2_XS": (1.1, 1.5),
    "IQ2_XXS": (1.6, 2.0),
    "IQ1_M": (2.8, 3.0),
    "IQ1_S": (4.5, 4.5),
}
_OTHER_LIMITS = (0.5, 0.5)


def kl_limit(header: GgufHeader) -> float:
    """Give the mean KL divergence that a file of this type may cost."""
    return KL_LIMITS.get(header.type_name, _OTHER_LIMITS)[0 if header.has_full_blocks else 1]
