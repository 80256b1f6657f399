"""US3L: universally slimmable self-supervised learning: one run, one set of weights, a network per width."""
