""" Remember me, where am I logged in, log out elsewhere, a new password: http://localhost:8080 """

import hashlib
import os
from secrets import compare_digest, token_urlsafe

from bottle import Bottle, abort, redirect, request, response, template
from bottle_session import Session

app = Bottle()
session = Session(os.environ.get('SESSION_SECRET', 'for trying this example only'), mode='file')
app.install(session)  # saves what a route changed, however the route ends
PAGE = '''<!doctype html><html lang="en">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{'Your account' if owner else 'Log in'}}</title>
<style>
  body { font: 17px/1.5 system-ui, sans-serif; max-width: 34rem; margin: 5vh auto; padding: 0 9px }
  li { display: flex; justify-content: space-between; align-items: center; gap: 1rem;
       padding: .7rem 0; border-bottom: 1px solid #dde }
  ul { padding: 0 } h2 { margin: 40px 0 0; font-size: 22px } small { display: block; color: #566 }
  .narrow { max-width: 20rem } .narrow input:not([type=checkbox]) { width: 100% }
  input, button { font: inherit; padding: .4rem .8rem; box-sizing: border-box }
  button { border: 0; border-radius: 4px; color: #fff; background: #15795c; white-space: nowrap }
</style>
<h1>{{'Hello, ' + owner if owner else 'Log in'}}</h1> <p role="status">{{message}}
% if not owner:
<form method="post" action="/login" class="narrow">
<p><label>Name <input name="name" autocomplete="username" required></label>
<p><label>Password <input name="password" type="password" autocomplete="current-password"></label>
<p><label><input type="checkbox" name="remember" value="yes"> Remember me for 90 days</label>
<small>Without it you are logged out when you close the browser, or after half a day away.</small>
<p><button>Log in</button> <small>For trying: joe, open sesame</small></form>
% else:
<h2>Where you are logged in</h2>
<form method="post" action="/logout"><input name="csrf" value="{{csrf}}" hidden><ul>
% for login in logins:
<li><span>{{device(login.note)}} {{!'<b>(this one)</b>' if login.here else ''}}
<small>Last use: {{'now' if login.here else ago(login.used)}}</small></span>
    <button name="id" value="{{login.id}}">Log out</button>
% end
</ul>
<button name="others" value="1" {{'' if logins[1:] else 'hidden'}}>Log out everywhere else</button>
</form>
<h2>Change your password</h2> <form method="post" action="/password" class="narrow">
<input name="csrf" value="{{csrf}}" hidden><input autocomplete="username" value="{{owner}}" hidden>
<p><label>Old password <input name="old" type="password" autocomplete="current-password"></label>
<p><label>New password, 8 characters or more
<input name="new" type="password" minlength="8" autocomplete="new-password" required></label>
<p><button>Change it</button> <small>This logs you out everywhere else, too.</small></form>
% end'''
BROWSERS = dict(Edg='Edge', OPR='Opera', Firefox='Firefox', FxiOS='Firefox', CriOS='Chrome',
                Chrome='Chrome', Safari='Safari')
SYSTEMS = 'iPhone', 'iPad', 'Android', 'Windows', 'Mac', 'Linux'


def device(agent):  # what people call it
    return '%s on %s' % (next((BROWSERS[part] for part in BROWSERS if part in agent), 'A program'),
                         next((name for name in SYSTEMS if name in agent), 'some device'))


def ago(time):  # a use is recorded only 30 times in the life of a session: it may be later
    hours = max(2, (session.clock() - time.timestamp()) // 3600 + 1)
    return 'less than %d %s ago' % ((hours, 'hours') if hours < 48 else (hours // 24 + 1, 'days'))


def hashed(password, salt):  # 16 MB, a third of a second
    return salt + hashlib.scrypt(password.encode(), salt=salt, n=2**14, r=8, p=5)


def is_right(name, password):
    known = USERS.get(name, NOBODY)  # an unknown name takes as long as a known one
    return compare_digest(hashed(password, known[:16]), known)


USERS = {'joe': hashed('open sesame', os.urandom(16))}
NOBODY = os.urandom(80)  # the hash of no password


def answer(message):
    session['flash'] = message
    redirect('/', 303)


@app.hook('before_request')
def check_form():  # is it from a page of ours? Another site can send one, too
    ours = request.get_header('Origin', '').partition('://')[2] == request.urlparts.netloc
    if request.method in ('GET', 'HEAD') or request.path == '/login' and ours:
        return  # a log-in has no token: the second of two clicks would send an old one
    if not session.owner:  # was logged out elsewhere
        redirect('/', 303)
    if not compare_digest(session['csrf'].encode(), request.forms.csrf.encode()):
        abort(403, 'This form is out of date. Go back, reload the page and try again.')


@app.get('/')
def home():
    response.set_header('Cache-Control', 'no-store')  # the back button shows nothing private
    return template(PAGE, owner=session.owner, logins=session.logins(), device=device, ago=ago,
                    message=session.pop('flash', ''), csrf=session.get('csrf', ''))


@app.post('/login')
def login():
    if not is_right(request.forms.name, request.forms.password):
        answer('Wrong name or password.')
    session.login(request.forms.name, request.get_header('User-Agent', ''))
    session.days, session.permanent = (90, True) if request.forms.remember else (0.5, False)
    session['csrf'] = token_urlsafe()
    answer('You are logged in.')


@app.post('/logout')
def logout():
    if request.forms.others:
        answer('Logged out elsewhere: %d.' % session.revoke_others())
    session.revoke(session.owner, request.forms.id)
    answer('That one is logged out.' if session.owner else 'You are logged out.')


@app.post('/password')
def password():
    if not is_right(session.owner, request.forms.old) or len(request.forms.new) < 8:
        answer('The old password is wrong, or the new one is too short. Nothing is changed.')
    USERS[session.owner] = hashed(request.forms.new, os.urandom(16))
    session.revoke_others()  # whoever knew the old one is out
    answer('Your password is changed, and you are logged out everywhere else.')


if __name__ == '__main__':
    app.run(host='localhost', port=8080)
