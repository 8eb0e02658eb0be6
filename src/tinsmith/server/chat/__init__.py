"""What the chat dialects share: which weights a model name means, prompts by its template, text from tokens.

A request becomes an `Ask` (`asks`), is drawn by the `ChatDesk` (`desk`) and comes back as tokens; `text` and
`tool_calls` turn those into what a dialect answers with, whole or piece by piece.
"""
