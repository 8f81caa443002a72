"""An HTTP server with OpenAI's API. ``lowbit.serving.app`` builds the application, ``server`` runs it."""
