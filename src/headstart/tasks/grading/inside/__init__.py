"""What runs inside the sandbox: a judge that holds the tests, and a process that holds the untrusted program.

`grading.sandbox` sends these modules, compiled, to a bare interpreter, so they use the standard library only (and
little of it: every import is paid for by every program). The two processes share no memory that matters. The program's
process is forked *before* the judge has read the tests and the nonce, then gives up every privilege it can. It only
ever receives arguments, and answers with plain values, which the judge decodes into trusted built-in types and compares
itself. What a program does to its own interpreter (frames, `gc`, builtins, `__eq__`) therefore stays in a process that
knows neither tests, nor expected values, nor the nonce.

Input (stdin): frames with these modules, the program, and the job (JSON: nonce, tests, names). Output (stdout): one
JSON line with nonce, status (passed, failed, timeout, error), detail and the program's CPU seconds.
"""
