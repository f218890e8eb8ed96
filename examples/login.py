""" A log-in done right: scrypt, a new id, CSRF checks, flash messages: http://localhost:8080 """

import functools
import hashlib
import hmac
import os
import secrets

from bottle import Bottle, abort, redirect, request, response, template
from bottle_session import Session

app = Bottle()
session = Session(os.environ.get('SESSION_SECRET', 'for trying this example only'), mode='file')
app.install(session)  # saves what a route changed, however the route ends

PAGE = '''<!doctype html>
<html lang="en">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{user or 'Log in'}}</title>
<style>
  body { font: 18px/1.5 system-ui, sans-serif; max-width: 19rem; margin: 9vh auto; padding: 0 9px }
  input, button { font: inherit; width: 100%; box-sizing: border-box; padding: .5rem }
  button { border: 0; border-radius: 4px; color: #fff; background: #15795c; cursor: pointer }
</style>
<h1>{{'Hello, ' + user if user else 'Log in'}}</h1> <p role="status">{{message}}
<form method="post" action="{{'/logout' if user else '/login'}}">
% if not user:
<p><label>Name <input name="name" autocomplete="username" required></label>
<p><label>Password <input name="password" type="password" autocomplete="current-password"></label>
<p><small>For trying: joe, open sesame</small>
% end
<p><input type="hidden" name="csrf" value="{{csrf}}">
<button>{{'Log out' if user else 'Log in'}}</button>
</form>'''

scrypt = functools.partial(hashlib.scrypt, n=2**14, r=8, p=5)  # 16 MB, a third of a second
SALT = os.urandom(16)  # joe's; every user has one, stored beside the hash
USERS = {'joe': (SALT, scrypt(b'open sesame', salt=SALT))}
NOBODY = os.urandom(16), os.urandom(64)  # the hash of no password


@app.hook('before_request')
def check_form():  # is it from a page of ours? Another site can send one, too
    if request.method not in ('GET', 'HEAD'):
        ours = request.get_header('Origin', '').partition('://')[2] == request.urlparts.netloc
        if session.owner and request.path != '/login':  # where a second click has no token left
            ours = hmac.compare_digest(session['csrf'].encode(), request.forms.csrf.encode())
        if not ours:
            abort(403, 'This form is out of date. Go back, reload the page and try again.')


@app.get('/')
def home():
    message = session.pop('flash', '')
    response.set_header('Cache-Control', 'no-store')  # the back button shows nothing private
    return template(PAGE, user=session.owner, message=message, csrf=session.get('csrf', ''))


@app.post('/login')
def login():
    name = request.forms.name
    salt, known = USERS.get(name, NOBODY)  # an unknown name takes as long as a known one
    if hmac.compare_digest(scrypt(request.forms.password.encode(), salt=salt), known):
        session.login(name)  # gives it a new id: who planted or saw the old one has nothing
        session.update(csrf=secrets.token_urlsafe(), flash='You are logged in.')
    else:
        session['flash'] = 'Wrong name or password.'
    redirect('/', 303)


@app.post('/logout')
def logout():
    session.purge()
    session['flash'] = 'You are logged out.'  # begins a new session
    redirect('/', 303)


if __name__ == '__main__':
    app.run(host='localhost', port=8080)
