"""Secure aggregation: the coordinator learns the sum of the hospitals' updates and no single one.

The protocol is that of Bonawitz et al. 2017 ("Practical secure aggregation for privacy-preserving
machine learning", Figure 4) on a complete graph, once a round, with fresh keys:

    keys     site -> two X25519 public keys and a commitment, signed by its identity
    shares   all keys -> site; site -> a Shamir share of its two secrets for each site, sealed
    round    who shared -> site; update -> weighted -> clipped -> integers -> masked -> coordinator
    unmask   who is there, who is not, sealed shares -> site; one share a site -> coordinator

    masked = integers + stream(own) + sum over later sites stream(pair) - sum over earlier ones

The pairs' streams cancel in the sum. Of who is there, shares give back `own`; of who is not, the
masking key; of nobody both. Pure functions and values; nothing here knows a transport.

    shamir     secrets in shares           rings      integers, and streams added to them
    exchange   keys, signatures, messages  member     a site's side    collector   the coordinator's
"""
