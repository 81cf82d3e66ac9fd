#!lua
-- APPEND: the owner's only write (core.conversation.append). Loaded twice: `append`, and `append_final` that a full
-- store takes too, for the batch that ends a turn or the conversation.
-- KEYS 1 meta  2 log  3 in  4 seen  5 state  6 tail  7 asks
-- ARGV 1 channel  2 owner  3 epoch  4 expected seq  5 batch  6 cursor  7 done  8 base  9 halted
--      10 '' or the status that it closes with  11 'ends', 'begins' (a turn) or ''  12 '1' if 13 is a state  13 state
--      14 number of questions  15… their ids and data, then events
-- ->   seq (OK) | {'GAP'|'PENDING', seq, batch} | {'FENCED', seq, batch, owner, epoch}
-- @include now
-- @include publish
local SEEN_WINDOW = 256
local head = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'seq', 'batch', 'cursor', 'position', 'done', 'base', 'status', 'halted')
if not head[9] then return {'FENCED', 0, '', '', 0} end
if head[1] ~= ARGV[2] or head[2] ~= ARGV[3] then return {'FENCED', head[3], head[4], head[1], head[2]} end
if head[3] ~= ARGV[4] then return {'GAP', head[3], head[4]} end
if ARGV[10] == 'stopped' then
  if head[9] ~= 'stopping' or head[6] ~= ARGV[6] then return {'PENDING', head[3], head[4]} end
elseif ARGV[10] ~= '' and head[9] ~= 'running' then
  return {'PENDING', head[3], head[4]}
end

local expected, asks = tonumber(ARGV[4]), tonumber(ARGV[14])
local before = 14 + 2 * asks
for i = before + 1, #ARGV do
  local reply = redis.pcall('XADD', KEYS[2], ARGV[3] .. '-' .. text(expected + i - before), 'e', ARGV[i])
  if reply.err then
    -- The second fence: the log holds a later epoch than the head, which went back in time.
    if i == before + 1 and string.find(reply.err, 'equal or smaller', 1, true) then
      return {'FENCED', head[3], head[4], head[1], head[2]}
    end
    return reply
  end
end
local seq = text(expected + #ARGV - before)
local cursor, done = tonumber(ARGV[6]), tonumber(ARGV[7])
local changes = {'seq', seq, 'batch', ARGV[5], 'updated', text(now)}
local function change(name, value)
  changes[#changes + 1] = name
  changes[#changes + 1] = value
end
if cursor > tonumber(head[5]) then
  change('cursor', ARGV[6])
  redis.call('XTRIM', KEYS[3], 'MINID', text(cursor + 1) .. '-0')
end
if done > tonumber(head[7]) then
  change('done', ARGV[7])
  local forget = math.min(done, tonumber(head[6]) - SEEN_WINDOW)
  if forget > 0 then redis.call('ZREMRANGEBYSCORE', KEYS[4], '(0', text(forget)) end
end
if tonumber(ARGV[8]) > tonumber(head[8]) then change('base', ARGV[8]) end
-- A head that was written before there were interrupts to keep has no such field.
if tonumber(ARGV[9]) > tonumber(head[10] or 0) then change('halted', ARGV[9]) end
if ARGV[10] ~= '' then
  change('owner', '')
  change('nonce', '')
  change('status', ARGV[10])
  if ARGV[10] == 'stopped' then change('done', head[6]) end
end
if ARGV[11] == 'ends' or ARGV[10] == 'stopped' then
  redis.call('UNLINK', KEYS[6], KEYS[7])
  change('asks', '0')
elseif ARGV[11] == 'begins' then
  redis.call('UNLINK', KEYS[6])
end
if asks > 0 then
  -- One by one: `unpack` has a limit, and a script that fails here has written half.
  for i = 15, before, 2 do redis.call('HSET', KEYS[7], ARGV[i], ARGV[i + 1]) end
  change('asks', text(redis.call('HLEN', KEYS[7])))
end
redis.call('HSET', KEYS[1], unpack(changes))
if ARGV[12] == '1' then redis.call('SET', KEYS[5], ARGV[13]) end
if #ARGV > before then publish_log(ARGV[1], ARGV[3], text(expected + 1), ARGV, before + 1) end
return expected + #ARGV - before
