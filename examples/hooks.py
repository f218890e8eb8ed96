""" Hooks that connect and save around every route, also those to come: http://localhost:8080 """

import os

import bottle
import bottle_session

SECRET = os.environ.get('SESSION_SECRET', 'for trying this example only')

app = bottle.Bottle()
session = bottle_session.Session(SECRET, mode='file')

PAGE = '''<!doctype html>
<html lang="en">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{here}}</title>
<style>
  body { font: 17px/1.5 system-ui, sans-serif; max-width: 26rem; margin: 12vh auto;
         padding: 0 1rem; color: #223 }
  a { color: #15795c; margin-right: 1rem }
  li { color: #667 }
</style>
<h1>{{here}}</h1>
<p>{{!' '.join('<a href="/%s">%s</a>' % (room, room) for room in rooms)}}
<p>Your way here, the last five rooms:
<ol>
% for room in path:
<li>{{room}}
% end
</ol>'''

ROOMS = 'kitchen', 'library', 'garden', 'attic'


@app.hook('before_request')
def connect():
    session.connect()


@app.hook('after_request')
def save():
    session.save()  # writes only if something changed


@app.get('/')
@app.get('/<room>')
def walk(room='hall'):
    if room != 'hall' and room not in ROOMS:
        bottle.abort(404, 'There is no such room.')
    session.data['path'] = session.data.get('path', [])[-4:] + [room]
    return bottle.template(PAGE, here=room, rooms=ROOMS, path=session.data['path'])


if __name__ == '__main__':
    app.run(host='localhost', port=8080)
