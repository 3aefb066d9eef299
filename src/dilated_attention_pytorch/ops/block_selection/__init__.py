"""Selection at the pace of the attention kernels; PyTorch has it in ``scoring``, ``selection``.

Names inside the kernels: a *plane* is one (sample, head) pair, heads being those of the pattern
unless said otherwise; a *row* is a query block, a *column* a key block. What a row may and must
read comes as five int32 numbers per row (``CandidateRule.intervals``): visible columns
``[low, end)``, of which ``[low, sink_end)`` and ``[near_first, near_end)`` are forced.
"""
