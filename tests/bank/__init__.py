"""The proof of the commit protocol: a bank that is tormented, and its books afterwards.

Eight client processes move money between accounts on four servers and append to lists,
through a proxy, and write down what they were told (`journal`). Meanwhile a tormentor
kills and stops clients and servers and cuts connections at each message of a commit.
When all is healed the servers are asked what they hold, past the library, and that is
compared with what was told (`audit`); the lists' history is searched for what no
isolated transactions could have seen (`history`, `anomalies`).

``python -m tests.bank 600`` runs it for ten minutes of faults; the suite for less.
"""
