#!lua flags=allow-oom
-- REPAIR: an owner writes again what the store has lost (core.repair.repair).
-- KEYS 1 meta  2 log  3 in  4 seen  5 state  6 tail  7 asks
-- ARGV 1 channel  2 owner  3 epoch  4 nonce  5 user  6 generation  7 created  8 metadata (JSON)
--      9 epoch  10 seq that the log must end with  11 batch ('' if the log needs nothing)  12 cursor  13 done  14 base
--      15 halted
--      16 '1' if 17 is a state  17 state  18 '1' if a turn ends  19 number of repaired message ids  20 of answered
--      questions  21 of open questions  22… these ids, these questions, the open ones' ids and data, then events
-- ->   'OK' | 'GAP' | 'FENCED' | 'CLOSED'
-- @include now
-- @include head
-- @include tip
-- @include publish
local tip_epoch, tip_seq = tip()
local head = read_head()
if not head then
  head = {owner = '', epoch = '0', seq = '0', batch = '', cursor = '0', position = '0', done = '0', base = '0',
    status = 'running', nonce = '', strikes = '0', struck = '0', strike_at = '0', user = ARGV[5], generation = ARGV[6],
    created = ARGV[7], metadata = ARGV[8], halted = '0', asks = '0', archived = '0',
    archived_epoch = '0', manifest = ''}
end
local epoch = tonumber(ARGV[3])
if head.generation ~= ARGV[6] or tonumber(head.epoch) > epoch then return 'FENCED' end
if tonumber(head.epoch) == epoch and head.owner ~= ARGV[2] then return 'FENCED' end
if head.status ~= 'running' and head.status ~= 'stopping' then return 'CLOSED' end
if tip_epoch ~= tonumber(ARGV[9]) or tip_seq ~= tonumber(ARGV[10]) or head.seq ~= ARGV[10] then return 'GAP' end

local settled, answered = tonumber(ARGV[19]), tonumber(ARGV[20])
local asked = 21 + settled + answered
local before = asked + 2 * tonumber(ARGV[21])
for i = before + 1, #ARGV do
  redis.call('XADD', KEYS[2], ARGV[3] .. '-' .. text(tip_seq + i - before), 'e', ARGV[i])
end

-- Repaired messages leave the inbox; what stays gets positions above all that the owner has taken in.
local repaired, kept, low = {}, {}, false
for i = 22, 21 + settled do
  repaired[ARGV[i]] = true
  redis.call('ZADD', KEYS[4], 0, ARGV[i])
end
local cursor, last = tonumber(ARGV[12]), 0
for _, entry in ipairs(redis.call('XRANGE', KEYS[3], '-', '+')) do
  local kind = entry[2][4] -- as put_inbox has written it
  if repaired[entry[2][2]] and kind ~= 'stop' and kind ~= 'interrupt' then
    redis.call('XDEL', KEYS[3], entry[1])
  else
    kept[#kept + 1] = entry
    last = tonumber(string.match(entry[1], '^%d+'))
    low = low or last <= cursor
  end
end
if low then
  -- A stream never takes an id twice: write what is left into a new one.
  redis.call('DEL', KEYS[3])
  for i, entry in ipairs(kept) do
    last = cursor + i
    redis.call('XADD', KEYS[3], text(last) .. '-0', unpack(entry[2]))
    local kind = entry[2][4]
    if kind ~= 'stop' and kind ~= 'interrupt' then redis.call('ZADD', KEYS[4], text(last), entry[2][2]) end
  end
end

if ARGV[18] == '1' then redis.call('UNLINK', KEYS[6], KEYS[7]) end
for i = 22 + settled, 21 + settled + answered do redis.call('HDEL', KEYS[7], ARGV[i]) end
for i = asked + 1, before, 2 do redis.call('HSET', KEYS[7], ARGV[i], ARGV[i + 1]) end
if ARGV[16] == '1' then redis.call('SET', KEYS[5], ARGV[17]) end
local function highest(...) return text(math.max(...)) end
head.owner, head.epoch, head.nonce, head.updated = ARGV[2], ARGV[3], ARGV[4], text(now)
head.seq = text(tip_seq + #ARGV - before)
if ARGV[11] ~= '' then head.batch = ARGV[11] end
head.cursor = highest(tonumber(head.cursor), cursor)
head.position = highest(tonumber(head.position), cursor, last)
head.done = highest(tonumber(head.done), tonumber(ARGV[13]))
head.base = highest(tonumber(head.base), tonumber(ARGV[14]))
head.halted = highest(tonumber(head.halted), tonumber(ARGV[15]))
head.asks = text(redis.call('HLEN', KEYS[7]))
write_head(head)
if #ARGV > before then publish_log(ARGV[1], ARGV[3], text(tip_seq + 1), ARGV, before + 1) end
return 'OK'
