"""What the server decides: sessions, futures, queues, turns, checkpoints. `service.Control` is its one entrance.

    service     the facade: starts, stops, hands on
    training    models and their requests     -> queues (order), scheduler (turns), execution (what a turn does)
    sampling    samplers and samples          -> samplers (snapshots that engines hold)
    checkpoints, records, registry            what is on disk, and what survives a restart
    admission, validation                     whether a request can work at all
    futures, sessions, janitor                results, clients, and the end of both

It knows no wire format and no HTTP, and reaches engines through `runtime.handle.EngineHandle` alone.
"""
