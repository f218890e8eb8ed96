""" A cart that two tabs can fill at once, and both are right: http://localhost:8080 """

import os

import bottle
import bottle_session

SECRET = os.environ.get('SESSION_SECRET', 'for trying this example only')

app = bottle.Bottle()
session = bottle_session.Session(SECRET, mode='file')

PRICES = {'apples': 240, 'bread': 390, 'cheese': 725}  # in cents

PAGE = '''<!doctype html>
<html lang="en">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>A shop</title>
<style>
  body { font: 17px/1.5 system-ui, sans-serif; max-width: 30rem; margin: 6vh auto;
         padding: 0 1rem; color: #223 }
  table { width: 100%; border-collapse: collapse; margin-bottom: 2rem }
  td { padding: .5rem 0; border-bottom: 1px solid #dde }
  td + td { text-align: right }
  input, button { font: inherit; padding: .3rem .7rem; margin: .15rem 0 }
  button { border: 0; border-radius: 4px; color: #fff; background: #15795c; cursor: pointer }
</style>
<h1>A shop</h1>
<form method="post" action="/add"><table>
% for item in prices:
<tr><td>{{item}}<td>{{'%.2f' % (prices[item] / 100)}}
    <td><button name="item" value="{{item}}">Add</button>
% end
</table></form>
<h2>Your cart</h2>
<table>
% for item, count in cart.items():
<tr><td>{{count}} &times; {{item}}<td>{{'%.2f' % (count * prices[item] / 100)}}
% end
<tr><td><b>Together</b><td><b>{{'%.2f' % (sum(cart[i] * prices[i] for i in cart) / 100)}}</b>
</table>
<form method="post" action="/note">
<label>A note for us <input name="note" value="{{note}}"></label> <button>Keep it</button>
</form>'''


@app.get('/')
def shop():
    session.connect()
    session.setdefault('cart', {})  # so that both tabs add to one session from the beginning
    session.save()
    return bottle.template(PAGE, prices=PRICES, cart=session['cart'],
                           note=session.get('note', ''))


@app.post('/add')
def add():
    item = bottle.request.forms.item
    if item not in PRICES:
        bottle.abort(404, 'We have no such thing.')
    with session:  # the other tab waits: between reading and saving, nobody else adds
        cart = session.setdefault('cart', {})
        cart[item] = cart.get(item, 0) + 1  # a change inside a value needs no flag
    bottle.redirect('/', 303)


@app.post('/note')
def note():
    session.connect()
    session['note'] = bottle.request.forms.note[:200]
    session.save()  # another key than the cart: what the other tab adds meanwhile is kept
    bottle.redirect('/', 303)


if __name__ == '__main__':
    app.run(host='localhost', port=8080)
