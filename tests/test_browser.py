""" The cookie and the examples in a real browser, by Selenium. """

import contextlib
import os
import re
import threading
import time
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import bottle
import pytest

from conftest import HERE, SECRET, Server, package, tool, until
from bottle_session import Session

#: Runs an example as `python examples/NAME.py` does, but at another address, and tells in its
#: log which requests begin. Kinds: 'one by one', as there; 'threads', one for each request;
#: 'quick', the same, and a password is looked at in no time.
EXAMPLE = '''
import hashlib, runpy, socketserver, sys, wsgiref.simple_server
import bottle
_, path, kind, host, port = sys.argv
scrypt = hashlib.scrypt
if kind == 'quick':
    hashlib.scrypt = lambda *args, **cost: scrypt(*args, **{**cost, 'n': 2})

class Threads(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = True

def run(app, **options):
    def told(environ, start_response):
        print('begins: %(REQUEST_METHOD)s %(PATH_INFO)s' % environ, file=sys.stderr, flush=True)
        return app(environ, start_response)

    options.update(host=host, port=int(port))
    if kind != 'one by one':
        options['server_class'] = Threads
    bottle.run(told, **options)

bottle.Bottle.run = run
runpy.run_path(path, run_name='__main__')
'''


@pytest.fixture(scope='module')
def start_browser(tmp_path_factory):
    """ A function that starts a browser with a new profile, as a Selenium driver. """
    webdriver = package('selenium.webdriver')
    get = 'apt-get install chromium chromium-driver'
    chromium = tool('chromium', 'chromium-browser', 'google-chrome', get=get)
    chromedriver = tool('chromedriver', get=get)
    with contextlib.ExitStack() as stack:
        def start():
            options = webdriver.ChromeOptions()
            options.binary_location = chromium
            for flag in ('headless=new', 'no-sandbox', 'disable-gpu', 'disable-quic',
                         'no-first-run', 'disable-background-networking',
                         'disable-component-update', 'disable-sync', 'window-size=900,700',
                         'user-data-dir=%s' % tmp_path_factory.mktemp('profile')):
                options.add_argument('--' + flag)
            driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
            stack.callback(driver.quit)
            driver.implicitly_wait(5)
            return driver

        yield start


@pytest.fixture(scope='module')
def two_browsers(start_browser):
    return start_browser(), start_browser()


@pytest.fixture
def browsers(two_browsers):
    """ Two browsers without a cookie: of different people, or of one on two devices. """
    for browser in two_browsers:
        browser.execute_cdp_cmd('Network.clearBrowserCookies', {})
    return two_browsers


@pytest.fixture
def browser(browsers):
    return browsers[0]


@pytest.fixture(scope='module')
def serve(tmp_path_factory):
    """ A function that serves an example and returns the server, with its page in `url`. """
    servers = {}

    def start(name, kind='quick'):
        if (name, kind) not in servers:
            path = os.path.join(HERE, 'examples', name + '.py')
            server = servers[name, kind] = Server(
                ['-c', EXAMPLE, path, kind, '{host}', '{port}'], tmp_path_factory.mktemp(name))
            server.url += '/'
        return servers[name, kind]

    yield start
    for server in servers.values():
        server.stop()


@pytest.fixture
def site():
    """ An app with the forms that other sites may show, served by this process. """
    app = bottle.Bottle()
    session = Session(SECRET, mode='memory')

    @app.get('/login/<user>')
    def login(user):
        session['user'] = user
        return 'welcome'

    @app.get('/logout')
    def logout():
        session.purge()

    @app.get('/form/<host>')
    def form(host):
        return '<form method="post" action="//%s:%s/act"><button>Win a prize</button></form>' % (
            host, bottle.request.urlparts.port)

    @app.route('/act', method=['GET', 'POST'])
    def act():
        return 'acted for %s' % session.get('user')

    server = make_server('127.0.0.1', 0, app, Threads, Quiet)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield 'http://127.0.0.1:%d/' % server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


class Threads(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class Quiet(WSGIRequestHandler):
    def log_message(self, *args):
        pass


def press(browser, label, number=0):
    """ Press the button with this label and wait for the next page. """
    browser.find_element('tag name', 'button')  # waits for the page
    buttons = browser.find_elements('xpath', '//button[normalize-space()="%s"]' % label)
    page = browser.find_element('tag name', 'html')
    buttons[number].click()
    until(lambda: is_gone(page))


def is_gone(element):
    from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
    try:
        element.is_enabled()
    except (StaleElementReferenceException, WebDriverException):
        return True


def text_of(browser):
    return browser.find_element('tag name', 'body').text


def fill_in(browser, **fields):
    for name, text in fields.items():
        browser.find_element('name', name).send_keys(text)


def log_in(browser, url, password='open sesame', remember=False):
    browser.get(url)
    fill_in(browser, name='joe', password=password)
    if remember:
        browser.find_element('name', 'remember').click()
    press(browser, 'Log in')


def cookie_of(browser):
    return browser.get_cookie('bsession')


# The cookie

def test_browser_stores_the_cookie_with_its_flags(browser, site):
    browser.get(site + 'login/joe')
    cookie = cookie_of(browser)
    assert re.fullmatch('[A-Za-z0-9_-]{43}', cookie.pop('value'))
    assert abs(cookie.pop('expiry') - time.time() - 30 * 86400) < 60
    assert cookie == {'name': 'bsession', 'domain': '127.0.0.1', 'path': '/', 'httpOnly': True,
                      'secure': False, 'sameSite': 'Lax'}
    assert browser.execute_script('return document.cookie') == ''
    browser.get(site + 'logout')
    assert browser.get_cookies() == []


def test_browser_a_form_of_another_site_carries_no_cookie(browser, site):
    browser.get(site + 'login/joe')
    browser.get(site + 'form/127.0.0.1')
    press(browser, 'Win a prize')
    assert text_of(browser) == 'acted for joe'
    browser.get(site.replace('127.0.0.1', 'localhost') + 'form/127.0.0.1')
    press(browser, 'Win a prize')
    assert browser.current_url == site + 'act' and text_of(browser) == 'acted for None'
    browser.get(site + 'act')
    assert text_of(browser) == 'acted for joe'


# login.py

def test_browser_logs_in_by_the_form_and_out_and_back_shows_nothing_private(browser, serve):
    url = serve('login').url
    log_in(browser, url, 'guess')
    assert 'Wrong name or password.' in text_of(browser) and browser.current_url == url
    before = cookie_of(browser)
    log_in(browser, url)
    assert 'Hello, joe' in text_of(browser) and 'You are logged in.' in text_of(browser)
    assert browser.current_url == url
    after = cookie_of(browser)
    assert after['value'] != before['value']
    browser.refresh()
    assert 'Hello, joe' in text_of(browser) and 'You are logged in.' not in text_of(browser)
    press(browser, 'Log out')
    assert 'You are logged out.' in text_of(browser) and 'joe' not in browser.title
    for _ in range(3):
        browser.back()
        until(lambda: browser.find_elements('tag name', 'h1'))
        assert 'Hello' not in text_of(browser)
    browser.delete_all_cookies()
    browser.get(url)
    browser.add_cookie({'name': 'bsession', 'value': after['value']})
    browser.refresh()  # the id of before the log-out is worth nothing
    assert 'Hello' not in text_of(browser)


@pytest.mark.parametrize('label, kind', [
    ('Log in', 'one by one'), ('Log in', 'threads'), ('Log out', 'threads')])
def test_browser_a_double_click_does_what_one_click_does(browser, serve, label, kind):
    server = serve('login', kind)

    def click_twice():
        """ Return how many forms the server got. Only the page knows when the first is sent. """
        browser.delete_all_cookies()
        if label == 'Log out':
            log_in(browser, server.url)
        else:
            log_in(browser, server.url, 'guess')  # begins a session, whose id then moves
            fill_in(browser, name='joe', password='open sesame')
        with open(server.log) as log:
            before = log.read().count('begins: POST')
        page = browser.find_element('tag name', 'html')
        browser.execute_script("""
            const button = document.querySelector('button');
            button.click();
            setTimeout(() => button.click(), arguments[0])""", pauses.pop())
        until(lambda: is_gone(page))
        until(lambda: browser.title == 'joe' if label == 'Log in' else browser.title == 'Log in')
        browser.refresh()  # it is not only this answer that says so
        said = 'Hello, joe' if label == 'Log in' else 'Password'
        assert said in text_of(browser) and 'out of date' not in text_of(browser)
        with open(server.log) as log:
            return log.read().count('begins: POST') - before

    # The first click must have left when the second comes, and no answer have arrived.
    pauses = [100, 2, 30, 10, 4, 60, 20, 5]
    until(lambda: click_twice() == 2)


def test_browser_two_profiles_are_two_visitors(browsers, serve):
    browser, other = browsers
    url = serve('login').url
    log_in(browser, url)
    other.get(url)
    assert 'Hello, joe' in text_of(browser) and 'Hello' not in text_of(other)
    log_in(other, url)
    assert cookie_of(browser)['value'] != cookie_of(other)['value']
    press(browser, 'Log out')
    other.refresh()
    assert 'Hello' not in text_of(browser) and 'Hello, joe' in text_of(other)


# account.py

def places_of(browser):
    """ Return what the list of log-ins says, from above. """
    return [item.text.splitlines()[0] for item in browser.find_elements('tag name', 'li')]


def test_browser_forgets_the_cookie_unless_it_is_to_remember_it(browser, serve):
    url = serve('account').url
    for remember in True, False:
        log_in(browser, url, remember=remember)
        cookie = cookie_of(browser)
        assert ('expiry' in cookie) is remember and cookie['httpOnly']
        if remember:
            assert abs(cookie['expiry'] - time.time() - 90 * 86400) < 60
        press(browser, 'Log out', places_of(browser).index('Chrome on Linux (this one)'))
        assert cookie_of(browser)['value'] != cookie['value']  # it has a message


def test_browser_lists_where_one_is_logged_in_and_ends_it_there(browsers, serve):
    one, other = browsers
    url = serve('account').url
    log_in(one, url)
    if len(places_of(one)) > 1:  # of other tests
        press(one, 'Log out everywhere else')
    assert places_of(one) == ['Chrome on Linux (this one)']
    assert 'Log out everywhere else' not in text_of(one)
    log_in(other, url, remember=True)
    assert sorted(places_of(other)) == ['Chrome on Linux', 'Chrome on Linux (this one)']
    one.refresh()
    assert sorted(places_of(one)) == ['Chrome on Linux', 'Chrome on Linux (this one)']

    press(one, 'Log out', places_of(one).index('Chrome on Linux'))
    assert 'That one is logged out.' in text_of(one)
    assert places_of(one) == ['Chrome on Linux (this one)']
    other.refresh()
    assert other.title == 'Log in'

    log_in(other, url)
    one.refresh()
    press(one, 'Log out everywhere else')
    assert 'Logged out elsewhere: 1.' in text_of(one)
    assert places_of(one) == ['Chrome on Linux (this one)']
    press(other, 'Log out')  # of a page that is older
    assert other.title == 'Log in'

    press(one, 'Log out')
    assert 'You are logged out.' in text_of(one) and one.title == 'Log in'
    one.back()
    until(lambda: one.find_elements('tag name', 'h1'))
    assert 'Hello' not in text_of(one)


def test_browser_a_changed_password_ends_all_other_log_ins(browsers, serve):
    one, other = browsers
    url = serve('account').url
    log_in(one, url)
    log_in(other, url)
    for old in 'guess', 'open sesame':
        other.refresh()
        assert 'Hello, joe' in text_of(other)
        fill_in(one, old=old, new='a better one')
        press(one, 'Change it')
        assert ('Your password is changed' in text_of(one)) is (old == 'open sesame')
    assert places_of(one) == ['Chrome on Linux (this one)']
    other.refresh()
    assert other.title == 'Log in'
    log_in(other, url)
    assert 'Wrong name or password.' in text_of(other)
    log_in(other, url, 'a better one')
    assert 'Hello, joe' in text_of(other) and len(places_of(other)) == 2
    fill_in(one, old='a better one', new='open sesame')  # for the other tests
    press(one, 'Change it')
    assert 'Your password is changed' in text_of(one)


# shop.py

def test_browser_two_tabs_of_the_shop_at_once_keep_what_both_add(browser, serve):
    url = serve('shop').url
    browser.get(url)
    tabs = [browser.current_window_handle]
    browser.switch_to.new_window('tab')
    browser.get(url)
    tabs.append(browser.current_window_handle)
    try:
        for tab, item in zip(tabs, ('apples', 'bread')):
            browser.switch_to.window(tab)
            browser.execute_script("""
                window.added = 0;
                for (let n = 0; n < 15; n++)
                    for (const item of ['cheese', arguments[0]])
                        fetch('/add', {method: 'POST', body: new URLSearchParams({item})})
                            .then(answer => { window.added += answer.ok })""", item)
        for tab in tabs:
            browser.switch_to.window(tab)
            until(lambda: browser.execute_script('return window.added') == 30)
        fill_in(browser, note='ring twice')
        press(browser, 'Keep it')
        press(browser, 'Add')
        browser.switch_to.window(tabs[0])
        browser.refresh()
        text = text_of(browser)
        assert [line in text for line in ('16 \xd7 apples', '15 \xd7 bread', '30 \xd7 cheese')] \
            == [True] * 3, text
        assert browser.find_element('name', 'note').get_attribute('value') == 'ring twice'
    finally:
        browser.switch_to.window(tabs[1])
        browser.close()
        browser.switch_to.window(tabs[0])
