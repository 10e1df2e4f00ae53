"""Proofs that two forms of a model are the same one: tensor by tensor, and by what they compute.

A model is right when it computes what the reference computes. Where it does not, the hidden states tell where it went wrong:
up to the fault they agree to rounding, behind it they do not. The first module that stands out is the one to mend, and a look
at its weights on both sides, or at how the error grows along the sequence, often says what happened to it.

The two models run one after the other and are never in memory together. First the reference: what it computes at every point
is written to a folder (`expected`, `record`). Then ours, on as many ranks as its layout has, by the very pipeline that trains
it: each rank reads the rows that it has computed itself, and keeps sums (`compare`). A model that does not fit into memory
gets the weights of a layer while it computes, and no longer (`streaming`).
"""
