#!lua flags=allow-oom
-- WAITED: a write for WAIT to speak of, behind what may have written nothing (convener.store.redis.confirm).
-- KEYS 1 waited, which expires: it says nothing
-- ->   'OK'
redis.call('SET', KEYS[1], '', 'PX', 1000)
return 'OK'
