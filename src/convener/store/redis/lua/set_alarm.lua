#!lua
-- SET_ALARM: keep what an alarm will say (core.intents.set_alarm).
-- KEYS 1 meta  2 seen  3 alarms
-- ARGV 1 alarm  2 data (JSON)
-- ->   'OK' | 'DUP' | 'NOT_FOUND' | 'CLOSED' | 'FULL'
local MAX_ALARMS = 1000
local status = redis.call('HGET', KEYS[1], 'status')
if not status then return 'NOT_FOUND' end
if status == 'stopping' or status == 'stopped' then return 'CLOSED' end
if redis.call('ZSCORE', KEYS[2], ARGV[1]) then return 'DUP' end
if redis.call('HLEN', KEYS[3]) >= MAX_ALARMS and redis.call('HEXISTS', KEYS[3], ARGV[1]) == 0 then return 'FULL' end
redis.call('HSET', KEYS[3], ARGV[1], ARGV[2])
return 'OK'
