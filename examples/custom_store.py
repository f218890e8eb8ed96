""" A store of one's own: sessions in a SQL database, by SQLAlchemy: http://localhost:8080 """

import os
import time

import bottle
import sqlalchemy as sql
from bottle_session import Session, SessionBusy, Store, StoreError

rows = sql.Table('bottle_sessions', sql.MetaData(),
                 sql.Column('name', sql.String(64), primary_key=True),
                 sql.Column('version', sql.LargeBinary), sql.Column('record', sql.LargeBinary),
                 sql.Column('expires', sql.Float(53), index=True),
                 sql.Column('holder', sql.LargeBinary), sql.Column('until', sql.Float(53)))
expired = sql.select(rows.c.name).where(rows.c.expires <= sql.bindparam('now')).limit(100)
clean = rows.delete().where(rows.c.name.in_(
    expired.with_for_update(skip_locked=True))).returning(rows.c.version)
sessions = sql.select(sql.func.count()).where(rows.c.version.between(b's', b't'))


class SQLStore(Store):  # each statement is a transaction, durable, with its conditions inside
    def __init__(self, url):  # for PostgreSQL postgresql+pg8000://..., which knows a timeout, too
        self.engine = sql.create_engine(url, connect_args={'timeout': 1}, pool_timeout=1)
        if self.engine.name == 'sqlite':
            self.run(sql.text('PRAGMA journal_mode = WAL'))  # readers and a writer at once
        self.run(sql.schema.CreateTable(rows, if_not_exists=True))
        self.run(sql.schema.CreateIndex(*rows.indexes, if_not_exists=True))
        self.engine.dispose()  # forked workers must not share a connection

    def run(self, statement, **values):
        try:
            with self.engine.begin() as connection:
                result = connection.execute(statement, values)
                return result.all() if result.returns_rows else result.rowcount
        except sql.exc.IntegrityError:  # the name is taken
            return 0
        except (sql.exc.SQLAlchemyError, OSError) as error:
            raise StoreError('The database cannot be used at the moment.') from error

    def load(self, name):
        return next((row.record for row in self.run(sql.select(rows).filter_by(name=name))), None)

    def create(self, name, record, expires, durable=False):
        self.run(clean, now=self.clock())  # a little, for each session that comes
        return self.run(rows.insert(), name=name, version=record[:16], record=record,
                        expires=expires, until=0) == 1

    def replace(self, name, version, record, expires, lock=None, durable=False):
        free = sql.or_(rows.c.until < time.time(), rows.c.holder == lock)
        if self.run(rows.update().where(rows.c.name == name, rows.c.version == version, free)
                    .values(version=record[:16], record=record, expires=expires)):
            return record
        if self.run(sql.select(rows.c.name).where(rows.c.name == name, sql.not_(free))):
            raise SessionBusy('Another request is using this session.')
        return self.load(name)

    def lock(self, name):
        lock, now = os.urandom(16), time.time()
        locked = self.run(rows.update().where(rows.c.name == name, rows.c.until < now)
                          .values(holder=lock, until=now + 30))
        record = self.load(name)
        if record and not locked:
            raise SessionBusy('Another request is using this session.')
        return record and (lock, record)

    def unlock(self, name, lock):
        self.run(rows.update().where(rows.c.name == name, rows.c.holder == lock).values(until=0))

    def remove(self, name, version=None):
        same = sql.true() if version is None else rows.c.version == version
        return self.run(rows.delete().where(rows.c.name == name, same)) == 1

    def sweep(self, now, progress=None):
        went = 0
        for gone in iter(lambda: self.run(clean, now=now), []):
            went += sum(row.version[:1] == b's' for row in gone)  # sessions begin with an s
        return went, self.run(sessions)[0][0]


session = Session(os.environ.get('SESSION_SECRET', 'for trying this example only'),
                  mode=SQLStore(os.environ.get('DATABASE_URL', 'sqlite:///sessions.db')))
app = bottle.Bottle()
PAGE = '''<!doctype html><html lang="en"><title>Visit {{n}}</title>
<meta name="viewport" content="width=device-width"><body style="font: 1.2em serif; margin: 3em">
<h1>Visit {{n}}</h1><p>The number is in a row of a database. <a href="/">Again</a>'''


@app.get('/')
def counter():
    with session:
        session['visits'] = session.get('visits', 0) + 1
    return bottle.template(PAGE, n=session['visits'])


if __name__ == '__main__':
    app.run(host='localhost', port=8080)
