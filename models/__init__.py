"""Small models of the protocol, searched state by state.

Each module models one part of docs/explanation/protocol.md: what nodes, store, clients and faults may do next, and
what must never be. `explore` visits every state that can be reached. Each rule of the protocol that a model has is a
*guard* that can be removed; a run says which are removed and what has to come of it: nothing wrong, or a certain
invariant broken, by a shortest counterexample of a known length. So a run fails if a rule stops being enough, and also
if it stops being needed.

``python -m models`` runs them (see `models.__main__`).
"""

from __future__ import annotations
