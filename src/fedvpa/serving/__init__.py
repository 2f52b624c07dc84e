"""One model that every user steers, as a service.

| module | what |
|---|---|
| `settings` | what a server is told |
| `store` | the database: comparisons, saved preferences, keys |
| `access` | who may ask for what, and how often |
| `people` | users: their comparisons and posteriors, and what to ask them next |
| `model` | the policy or the base model, and under which preference an answer is drawn |
| `shapes` | requests and responses, in OpenAI's form |
| `chat`, `users` | the routes |
| `app` | the application |
| `observing` | logs, metrics |
| `serve` | the process |
"""
