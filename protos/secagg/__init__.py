"""Secure aggregation: a sum of the clients' vectors that shows none of them, by pairwise masks.

After Bonawitz et al. 2017 and Bell et al. 2020. `client` and `server` are the two sides of an attempt, without I/O;
`coordinates` is what the numbers mean. What it gives and what it does not is in docs/secure-aggregation.md.
"""
