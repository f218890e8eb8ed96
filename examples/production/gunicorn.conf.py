# `gunicorn` alone, started in this directory, reads this file.

wsgi_app = 'app:app'
bind = '127.0.0.1:8000'  # for the proxy, which does the https
workers = 4              # about two per core
threads = 4              # for requests that wait
preload_app = True       # a mistake in the settings ends the start, not each worker in turn
accesslog = '-'
