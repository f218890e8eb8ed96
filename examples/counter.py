""" Counts this browser's visits, and goes on after a restart: http://localhost:8080 """

import os

import bottle
import bottle_session

SECRET = os.environ.get('SESSION_SECRET', 'for trying this example only')

app = bottle.Bottle()
session = bottle_session.Session(SECRET, mode='file')

PAGE = '''<!doctype html>
<html lang="en">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Visit {{visits}}</title>
<style>
  body { font: 18px/1.5 system-ui, sans-serif; max-width: 30rem; margin: 12vh auto;
         padding: 0 1rem; color: #223; text-align: center }
  b { display: block; font-size: 7rem; line-height: 1.3; color: #15795c }
  a { color: #15795c }
</style>
<p>You were here <b>{{visits}}</b> {{'time' if visits == 1 else 'times'}}.
<p><a href="/">Come again</a>
<p><small>Restart the server, and it goes on counting. Another browser begins at 1.</small>'''


@app.get('/')
def counter():
    with session:  # visits at the same time count, too
        session['visits'] = session.get('visits', 0) + 1
    return bottle.template(PAGE, visits=session['visits'])


if __name__ == '__main__':
    app.run(host='localhost', port=8080)
