"""The face for notebooks: each stage as a function, with the checks, defaults and results of its command.

Silent unless asked (`verbose`), and the process stays as it was: generators of random numbers, number of threads,
handlers of signals, environment. What a user can cause is a `UserError`. Imports no torch before it is needed.
"""
